"""Serialization of a config, durations, and the length of a run."""

import dataclasses
import json

import pytest

from vit_jax.checkpoint.renamed_settings import RENAMED_SETTINGS, rename_settings
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.fields import config_from_dict, config_to_dict, flatten_config


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


def test_did_you_mean_names_the_nearest_or_all():
  assert "'adamw'" in did_you_mean('adma', ('adamw', 'sgd'))
  assert 'adamw, sgd' in did_you_mean('x', (name for name in ('adamw', 'sgd')))
