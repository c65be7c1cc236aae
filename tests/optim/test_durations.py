"""Durations, schedules of events, and the number of steps of a run."""

import pytest

from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError
from vit_jax.optim.durations import due, parse_duration, total_steps
from vit_jax.settings.fields import with_settings

TEN_STEPS = Config(steps=10, data=DataConfig(batch=50))
MIXTURE = {'data.unlabelled': 'images:a', 'data.unlabelled_ratio': 3}


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
