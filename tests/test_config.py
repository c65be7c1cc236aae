"""Every wrong setting is an error that names it; every right one survives the way through config.json."""

import dataclasses
import json
import math
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from vit_jax.config import (
  CHOICES,
  RANGES,
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  config_from_dict,
  config_to_dict,
  flatten_config,
  parse_duration,
  total_steps,
  validate,
)
from vit_jax.config_checks import setting_types
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.masked import PATCH_TARGETS
from vit_jax.models.vit import GELU_FUNCTIONS, REMAT_POLICIES
from vit_jax.optim.losses import LOSSES, MASK_LOSSES
from vit_jax.optim.optimizer import LR_DECAYS, UPDATE_RULES


def changed(**settings) -> Config:
  """A valid config of 10 steps, with settings replaced: `changed(data__batch=3)`."""
  config = Config(steps=10)
  for name, value in settings.items():
    *outer, field = name.split('__')
    owner = getattr(config, outer[0]) if outer else config
    setattr(owner, field, value)
  return config


def test_ranges_and_choices_are_of_fields_that_exist():
  assert set(RANGES) | set(CHOICES) <= set(flatten_config(Config()))


def test_every_default_is_valid_and_every_number_that_may_be_wrong_has_a_range():
  assert validate(Config(steps=1)) == Config(steps=1)
  assert validate(Config(epochs=0.5)) == Config(epochs=0.5)
  numbers = {
    name for name, value in flatten_config(Config()).items() if type(value) in (int, float)
  }
  assert numbers - set(RANGES) == {'model.head_bias'}


# What some choices need besides.
NEED = {'random': {'data__resize_before_crop': 256}, 'staircase': {'optim__lr_boundaries': '50%'}}


@pytest.mark.parametrize(
  ('name', 'value'), [(name, value) for name, choices in CHOICES.items() for value in choices]
)
def test_every_choice_is_accepted(name, value):
  config = changed(**{name.replace('.', '__'): value}, **NEED.get(value, {}))
  assert flatten_config(validate(config))[name] == value


def test_every_choice_has_an_implementation_and_every_implementation_is_a_choice():
  tables = {
    'model.gelu': GELU_FUNCTIONS,
    'model.remat': REMAT_POLICIES,
    'optim.name': UPDATE_RULES,
    'optim.schedule': LR_DECAYS,
    'loss': LOSSES,
  }
  tables |= {'mask.target': {'', *PATCH_TARGETS}}
  assert MASK_LOSSES.keys() == PATCH_TARGETS.keys()
  assert {name: set(table) for name, table in tables.items()} == {
    name: set(CHOICES[name]) for name in tables
  }


def test_a_config_is_the_same_after_json():
  config = Config(
    data=DataConfig(size=(32, 48), crop_area=(0.5, 0.75)),
    model=ModelConfig(variant='Ti/4', mean=(1.0, 2.0, 3.0), pool='map'),
    optim=OptimConfig(lr=0.1, weight_decay_mask='.*/kernel'),
    epochs=2.5,
    init='runs/a',
  )
  again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
  assert again == config
  assert flatten_config(again) == flatten_config(config)
  assert isinstance(again.data.size, tuple)


def test_flat_names_are_those_of_the_flags():
  assert flatten_config(Config())['data.batch'] == 256
  assert flatten_config(Config())['seed'] == 0
  parts = [
    getattr(Config(), f.name)
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(f.type)
  ]
  leaves = sum(len(dataclasses.fields(part)) for part in parts)
  assert len(flatten_config(Config())) == leaves + len(dataclasses.fields(Config)) - len(parts)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'step': 3}, "'step' is unknown. Did you mean 'steps'?"),
    ({'data': {'bach': 3}}, "'bach' is unknown. Did you mean 'batch'?"),
    ({'optim': {'zzzz': 3}}, "'zzzz' is unknown. Known: name, lr, schedule"),
  ],
)
def test_an_unknown_field_is_an_error_that_names_the_right_one(values, message):
  with pytest.raises(UserError) as error:
    config_from_dict(values)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('size', 'expected'),
  [((224, 192), (224, 192)), ((28,), (28, 28)), (28, (28, 28)), ([32, 16], (32, 16))],
  ids=str,
)
def test_sizes_are_spelled_out_and_the_config_given_stays_as_it_was(size, expected):
  config = changed(data__size=size)
  assert validate(config).data.size == expected
  assert config.data.size is size


NAN = float('nan')
WRONG = [
  # The settings -> what the error names.
  ({'data__crop': 'inceptoin'}, ["config.data.crop='inceptoin'", "Did you mean 'inception'?"]),
  ({'data__eval_crop': 'centre'}, ["config.data.eval_crop='centre'", "Did you mean 'center'?"]),
  ({'data__bad_images': 'ignore'}, ["config.data.bad_images='ignore'", 'Known: error, skip.']),
  ({'model__pool': 'tokens'}, ["config.model.pool='tokens'", "Did you mean 'token'?"]),
  ({'model__position': 'sincos'}, ["config.model.position='sincos'", "Did you mean 'sincos2d'?"]),
  ({'model__gelu': 'relu'}, ["config.model.gelu='relu'", 'tanh, erf']),
  ({'model__dtype': 'float16'}, ["config.model.dtype='float16'", 'bfloat16']),
  ({'model__remat': 'all'}, ["config.model.remat='all'", 'none, vit, dots, full']),
  ({'optim__name': 'adam'}, ["config.optim.name='adam'", "Did you mean 'adamw'?"]),
  ({'optim__schedule': 'cosin'}, ["config.optim.schedule='cosin'", "Did you mean 'cosine'?"]),
  ({'optim__momentum_dtype': 'bf16'}, ["config.optim.momentum_dtype='bf16'"]),
  ({'loss': 'softmx'}, ["config.loss='softmx'", "Did you mean 'softmax'?"]),
  ({'data__size': (8, 8, 3)}, ['config.data.size=(8, 8, 3)', '2 whole numbers']),
  ({'data__size': ()}, ['config.data.size=()']),
  ({'data__size': (0, 8)}, ['config.data.size=(0, 8)']),
  ({'data__size': -8}, ['config.data.size=(-8, -8)', 'HEIGHT,WIDTH']),
  (
    {'data__randaug_ops': 2},
    ['config.data.randaug_ops=2 with randaug_magnitude=0: one needs the other'],
  ),
  ({'data__crop': 'random'}, ['config.data.resize_before_crop=0 is less than the size (224, 224)']),
  (
    {'data__resize_before_crop': 256},
    ["config.data.resize_before_crop=256: only config.data.crop='random'"],
  ),
  (
    {'data__confidence_threshold': 0.5},
    ['config.data.confidence_threshold=0.5 is of no images: config.data.unlabelled names none'],
  ),
  (
    {'optim__schedule': 'staircase'},
    ["config.optim.schedule='staircase' with lr_boundaries='' and lr_boundary_every='0'"],
  ),
  (
    {'optim__lr_boundary_every': '2ep'},
    ["config.optim.schedule='cosine' with lr_boundaries='' and lr_boundary_every='2ep'"],
  ),
  ({'data__crop_area': (0.0, 1.0)}, ['config.data.crop_area=(0.0, 1.0)', '0 < LOW <= HIGH <= 1']),
  ({'data__crop_area': (0.5, 0.4)}, ['config.data.crop_area=(0.5, 0.4)']),
  ({'data__crop_area': (0.5, 1.5)}, ['config.data.crop_area=(0.5, 1.5)']),
  ({'data__crop_area': (NAN, 1.0)}, ['config.data.crop_area=(nan, 1.0)']),
  ({'data__crop_aspect': (2.0, 1.0)}, ['config.data.crop_aspect=(2.0, 1.0)']),
  ({'data__crop_aspect': (-1.0, 1.0)}, ['config.data.crop_aspect=(-1.0, 1.0)']),
  (
    {'data__eval_crop': 'center', 'data__eval_short_side': 200},
    ['config.data.eval_short_side=200', '(224, 224)'],
  ),
  (
    {'data__batch': 10, 'optim__grad_accum_steps': 4},
    ['config.data.batch=10', 'config.optim.grad_accum_steps=4'],
  ),
  ({'model__scale': (1.0, 0.0, 1.0)}, ['config.model.scale=(1.0, 0.0, 1.0)']),
  (
    {'optim__weight_decay_mask': '(kernel'},
    ["config.optim.weight_decay_mask='(kernel' is not a regular expression"],
  ),
  ({'optim__freeze': '*'}, ["config.optim.freeze='*' is not a regular expression"]),
  ({'steps': 0}, ['steps=0 and epochs=0', 'exactly one']),
  ({'epochs': 2.5}, ['steps=10 and epochs=2.5', 'exactly one', '--config.steps=0']),
]


@pytest.mark.parametrize(('settings', 'messages'), WRONG, ids=[str(row[0]) for row in WRONG])
def test_a_wrong_value_is_an_error_that_names_the_field_and_what_it_may_be(settings, messages):
  with pytest.raises(UserError) as error:
    validate(changed(**settings))
  assert all(message in str(error.value) for message in messages), str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', RANGES)
def test_a_number_outside_its_range_is_an_error_that_names_the_range(name):
  low, high = RANGES[name]
  nan = [NAN] if setting_types(Config)[name] is float else []
  for value in (low - 1, *nan, *([high + 1] if high < float('inf') else [])):
    with pytest.raises(UserError) as error:
      validate(changed(**{name.replace('.', '__'): value}))
    assert str(error.value).startswith(
      f'config.{name}={value}: expected a number from {low} to {high}'
    )


@pytest.mark.parametrize(
  'settings', [{'optim__lr': float('inf')}, {'epochs': float('inf'), 'steps': 0}], ids=str
)
def test_infinity_is_no_rate_and_no_duration(settings):
  with pytest.raises(UserError, match=r'config\.(optim\.lr|epochs)=inf'):
    validate(changed(**settings))


# For each type, values that are not of it. A config file can hold anything; flags are checked before they get here.
ANYTHING = [
  None,
  True,
  3,
  3.5,
  '3',
  b'3',
  (),
  (1,),
  (1.0, 2.0, 3.0, 4.0),
  ('a', 'b'),
  ('a', 'b', 'c'),
  [1, 2],
  {},
  object(),
  1j,
]
FITS = {
  int: lambda value: type(value) is int,
  float: lambda value: type(value) in (int, float),
  str: lambda value: type(value) is str,
  bool: lambda value: type(value) is bool,
  tuple[str, ...]: lambda value: type(value) is tuple and all(type(part) is str for part in value),
}


@pytest.mark.parametrize(
  ('name', 'kind'), setting_types(Config).items(), ids=lambda x: x if isinstance(x, str) else ''
)
def test_a_value_of_another_type_is_an_error_that_names_the_field(name, kind):
  wrong = [value for value in ANYTHING if not FITS.get(kind, lambda value: False)(value)]
  if name == 'data.size':  # One number means a square.
    wrong = [value for value in wrong if value not in (3, (1,), [1, 2])]
  for value in wrong:
    with pytest.raises(UserError, match=re.escape(f'config.{name}=')):
      validate(changed(**{name.replace('.', '__'): value}))


NUMBERS = [name for name, kind in setting_types(Config).items() if kind in (int, float)]
LIMITS = {name: RANGES.get(name, (-math.inf, math.inf)) for name in NUMBERS}


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
  st.sampled_from(NUMBERS),
  st.one_of(st.integers(), st.floats(), st.sampled_from([math.inf, -math.inf, NAN])),
)
def test_any_number_is_within_its_range_and_of_its_type_or_an_error_that_names_the_field(
  name, value
):
  low, high = LIMITS[name]
  fits = (
    low <= value <= high
    and math.isfinite(value)
    and (isinstance(value, int) or setting_types(Config)[name] is float)
  )
  try:
    validate(changed(**{name.replace('.', '__'): value}))
  except UserError as error:
    said = str(error)
    assert name.rpartition('.')[2] in said and '\n' not in said
    assert (
      not fits or 'expected a number from' not in said
    )  # Else it does not go together with another setting.
  else:
    assert fits


@pytest.mark.parametrize(
  'values', [None, 3, 'data', [], {'data': None}, {'optim': 3}, {'model': []}]
)
def test_what_is_no_table_of_settings_is_an_error(values):
  with pytest.raises(UserError, match='a table of settings'):
    config_from_dict(values)


@pytest.mark.parametrize(
  ('text', 'steps'),
  [
    ('0', 0), ('0ep', 0), ('0%', 0), ('500', 500), ('2ep', 25), ('0.5ep', 6), ('10%', 100), ('0.25%', 2),
    ('100%', 1000), ('0.001ep', 1), ('0.0001%', 1), (' 7 ', 7), (50, 50),
  ],
)  # fmt: skip
def test_durations_are_steps_epochs_or_a_share_of_the_run(text, steps):
  assert parse_duration(text, name='log_every', steps=1000, epoch=12.5) == steps


@pytest.mark.parametrize(
  'text', ['', 'ep', '-1', '1.5', '2 ep', '2epochs', '10 %', '1e3', 'all', '5ep5', '.5ep']
)
def test_what_is_no_duration_is_an_error_that_shows_the_three_kinds(text):
  with pytest.raises(UserError) as error:
    parse_duration(text, name='optim.warmup', steps=1000, epoch=12.5)
  assert f'config.optim.warmup={text!r}' in str(error.value)
  assert all(
    kind in str(error.value) for kind in ("'500' (steps)", "'2ep' (epochs)", "'10%' (of the run)")
  )


@pytest.mark.parametrize(
  ('settings', 'steps'),
  [
    ({}, 10),
    ({'steps': 0, 'epochs': 3.0, 'data__batch': 10}, 30),
    ({'steps': 0, 'epochs': 2.0, 'data__batch': 64}, 3),  # 100 / 64 · 2 = 3.125 batches.
    ({'steps': 0, 'epochs': 0.01, 'data__batch': 64}, 1),
    ({'data__batch': 100}, 10),
  ],
)
def test_steps_are_given_or_come_from_epochs(settings, steps):
  assert total_steps(changed(**({'data__batch': 50} | settings)), 100) == steps


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'data__batch': 101},
      'config.data.batch=101 is more than the 100 training examples of builtin:fashion_mnist',
    ),
    ({'optim__warmup': '10'}, 'warmup (10) and cooldown (0) leave nothing of 10 steps'),
    (
      {'optim__warmup': '60%', 'optim__cooldown': '40%'},
      'warmup (6) and cooldown (4) leave nothing of 10 steps',
    ),
    ({'optim__warmup': '5ep'}, 'warmup (10) and cooldown (0) leave nothing of 10 steps'),
    ({'optim__warmup': 'long'}, "config.optim.warmup='long': expected a duration"),
    ({'optim__cooldown': '-1'}, "config.optim.cooldown='-1': expected a duration"),
  ],
)
def test_a_batch_or_a_ramp_that_does_not_fit_is_an_error(settings, message):
  with pytest.raises(UserError) as error:
    total_steps(changed(**({'data__batch': 50} | settings)), 100)
  assert message in str(error.value)


def test_a_ramp_may_take_all_steps_but_one():
  assert total_steps(changed(data__batch=50, optim__warmup='9'), 100) == 10


def test_did_you_mean_names_the_nearest_or_all():
  assert did_you_mean('adma', ('adamw', 'sgd')) == " Did you mean 'adamw'?"
  assert did_you_mean('x', (name for name in ('adamw', 'sgd'))) == ' Known: adamw, sgd.'


def test_of_evaluations_there_may_be_any_number_but_each_is_text():
  for entries in ((), ('knn:builtin:digits',), ('a', 'b', 'c')):
    assert validate(Config(steps=1, probes=entries)).probes == entries
  for wrong in ('knn:builtin:digits', ('a', 1), ['a']):
    with pytest.raises(UserError, match=r'config.probes=.*: expected .*any number of them'):
      validate(Config(steps=1, probes=wrong))
