"""Serialization of a config, durations, and the length of a run."""

import dataclasses
import json

import pytest

from vit_jax.config import (
  RENAMED_SETTINGS,
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  config_from_dict,
  config_to_dict,
  due,
  flatten_config,
  parse_duration,
  rename_settings,
  total_steps,
  with_settings,
)
from vit_jax.errors import UserError, did_you_mean

TEN_STEPS = Config(steps=10, data=DataConfig(batch=50))
MIXTURE = {'data.unlabelled': 'images:a', 'data.unlabelled_ratio': 3}


def test_a_config_survives_json():
  config = Config(
    data=DataConfig(size=(32, 48), crop_area=(0.5, 0.75)),
    model=ModelConfig(variant='Ti/4', mean=(1.0, 2.0, 3.0), pool='map'),
    optim=OptimConfig(lr=0.1, weight_decay_mask='.*/kernel'),
    epochs=2.5,
    init='runs/a',
    probes=('fewshot:builtin:digits',),
  )
  again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
  assert again == config
  assert flatten_config(again) == flatten_config(config)
  assert isinstance(again.data.size, tuple)


def test_flat_names_are_the_names_of_the_flags():
  assert flatten_config(Config())['data.batch'] == 256
  assert flatten_config(Config())['seed'] == 0
  fields = dataclasses.fields(Config)
  groups = [f.type for f in fields if dataclasses.is_dataclass(f.type)]
  leaves = sum(len(dataclasses.fields(group)) for group in groups)
  assert len(flatten_config(Config())) == leaves + len(fields) - len(groups)


@pytest.mark.parametrize(
  ('values', 'names'),
  [
    ({'step': 3}, ["'step'", "'steps'"]),
    ({'data': {'bach': 3}}, ["'bach'", "'batch'"]),
    ({'optim': {'zzzz': 3}}, ["'zzzz'", 'name, lr, schedule']),
  ],
)
def test_an_unknown_field_raises_an_error_that_names_it_and_the_nearest(values, names):
  with pytest.raises(UserError) as error:
    config_from_dict(values)
  assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
  'values', [None, 3, 'data', [], {'data': None}, {'optim': 3}, {'model': []}]
)
def test_only_nested_dicts_are_a_config(values):
  with pytest.raises(UserError):
    config_from_dict(values)


def test_renaming_moves_every_old_setting_to_an_existing_one_and_keeps_the_rest():
  old = {'data': {'batch': 8}, 'optim': {}, 'steps': 3}
  expected = {'data.batch': 8, 'steps': 3}
  for i, (before, after) in enumerate(RENAMED_SETTINGS.items()):
    group, _, name = before.rpartition('.')
    (old[group] if group else old)[name] = i
    expected[after] = i
  before = json.dumps(old)
  config = config_from_dict(rename_settings(old))
  assert {name: flatten_config(config)[name] for name in expected} == expected
  assert json.dumps(old) == before
  assert not RENAMED_SETTINGS.keys() & flatten_config(Config()).keys()


def test_renaming_leaves_a_config_with_new_names_as_it_is():
  values = config_to_dict(Config(optim=OptimConfig(grad_clip_norm=0.5), max_to_keep=7, steps=1))
  assert rename_settings(values) == values


@pytest.mark.parametrize(
  ('text', 'steps'),
  [
    ('0', 0), ('0ep', 0), ('0%', 0), ('500', 500), ('2ep', 25), ('0.5ep', 6), ('0.3ep', 4),
    ('10%', 100), ('0.25%', 2), ('100%', 1000), ('0.001ep', 1), ('0.0001%', 1), (' 7 ', 7),
    (50, 50),
  ],
)  # fmt: skip
def test_a_duration_is_steps_epochs_or_a_part_of_the_run(text, steps):
  assert parse_duration(text, name='log_every', steps=1000, epoch=12.5) == steps


@pytest.mark.parametrize(
  'text', ['', 'ep', '-1', '1.5', '2 ep', '2epochs', '10 %', '1e3', 'all', '5ep5', '.5ep']
)
def test_an_invalid_duration_raises_an_error_that_shows_the_three_kinds(text):
  with pytest.raises(UserError) as error:
    parse_duration(text, name='optim.warmup', steps=1000, epoch=12.5)
  assert f'config.optim.warmup={text!r}' in str(error.value)
  assert all(kind in str(error.value) for kind in ("'500'", "'2ep'", "'10%'"))


def test_an_event_is_due_at_the_multiples_of_its_interval_and_after_the_last_step():
  assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
  assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]


@pytest.mark.parametrize(
  ('settings', 'steps'),
  [
    ({}, 10),
    ({'steps': 0, 'epochs': 3.0, 'data.batch': 10}, 30),
    ({'steps': 0, 'epochs': 2.0, 'data.batch': 64}, 3),  # 100 / 64 · 2 = 3.125 batches.
    ({'steps': 0, 'epochs': 1.8, 'data.batch': 64}, 3),  # 2.8125 batches.
    ({'steps': 0, 'epochs': 0.01, 'data.batch': 64}, 1),
    ({'data.batch': 100}, 10),
    ({'optim.warmup': '9'}, 10),
    # A batch of 40 has 10 labelled images and 30 unlabelled ones.
    ({'steps': 0, 'epochs': 2.0, 'data.batch': 40} | MIXTURE, 20),
  ],
)
def test_the_number_of_steps_is_given_or_follows_from_epochs(settings, steps):
  assert total_steps(with_settings(TEN_STEPS, settings), 100) == steps


@pytest.mark.parametrize(
  ('settings', 'names'),
  [
    ({'data.batch': 101}, ['config.data.batch=101', '100', 'builtin:fashion_mnist']),
    ({'optim.warmup': '10'}, ['warmup (10)', 'cooldown (0)', '10 steps']),
    ({'optim.warmup': '60%', 'optim.cooldown': '40%'}, ['warmup (6)', 'cooldown (4)', '10 steps']),
    ({'optim.warmup': '5ep'}, ['warmup (10)']),
    ({'optim.warmup': 'long'}, ["config.optim.warmup='long'"]),
    ({'optim.cooldown': '-1'}, ["config.optim.cooldown='-1'"]),
  ],
)
def test_a_batch_or_a_ramp_that_does_not_fit_raises_an_error(settings, names):
  with pytest.raises(UserError) as error:
    total_steps(with_settings(TEN_STEPS, settings), 100)
  assert all(name in str(error.value) for name in names), str(error.value)


@pytest.mark.parametrize(
  ('ramps', 'flags'),
  [
    ({'optim.warmup': '5%'}, '--config.optim.warmup=0'),
    ({'optim.cooldown': '10%'}, '--config.optim.cooldown=0'),
    (
      {'optim.warmup': '5%', 'optim.cooldown': '10%'},
      '--config.optim.warmup=0 --config.optim.cooldown=0',
    ),
  ],
)
def test_a_ramp_that_fills_a_run_of_one_step_names_the_flags_that_help(ramps, flags):
  config = with_settings(TEN_STEPS, ramps | {'steps': 1})
  with pytest.raises(UserError, match=f'of 1 steps: add {flags},'):
    total_steps(config, 100)
  off = dict.fromkeys(ramps, '0')
  assert total_steps(with_settings(config, off), 100) == 1


def test_did_you_mean_names_the_nearest_or_all():
  assert "'adamw'" in did_you_mean('adma', ('adamw', 'sgd'))
  assert 'adamw, sgd' in did_you_mean('x', (name for name in ('adamw', 'sgd')))
