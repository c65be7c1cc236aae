"""Validation: every wrong setting raises an error that names it, and every right one passes."""

import math
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from vit_jax.config import UNLABELLED_DEFAULTS, Config
from vit_jax.config_checks import validate
from vit_jax.data.augment import RANDAUGMENT_TABLES
from vit_jax.errors import UserError
from vit_jax.models.attention import ATTENTION_IMPLEMENTATIONS
from vit_jax.models.masked import PATCH_TARGETS
from vit_jax.models.vit import GELU_FUNCTIONS, REMAT_POLICIES
from vit_jax.optim.losses import LOSSES, MASK_LOSSES, REDUCTIONS
from vit_jax.optim.optimizer import LR_DECAYS
from vit_jax.optim.update_rules import UPDATE_RULES
from vit_jax.settings.conditions import READ_ONLY_WHEN
from vit_jax.settings.fields import flatten_config, setting_types, with_settings
from vit_jax.settings.limits import CHOICES, RANGES

DEFAULTS = flatten_config(Config())
NAN = float('nan')


def changed(settings: dict[str, object]) -> Config:
  """Return a valid config of 10 steps with some settings replaced."""
  return with_settings(Config(steps=10), settings)


def test_tables_list_only_settings_that_exist():
  needed = {name for row in READ_ONLY_WHEN.values() for needs in row for name in needs}
  assert set(RANGES) | set(CHOICES) | set(READ_ONLY_WHEN) | needed <= DEFAULTS.keys()
  unlabelled = {
    name for name, row in READ_ONLY_WHEN.items() if any('data.unlabelled' in needs for needs in row)
  } - {
    'data.dir', 'data.orient', 'data.jpeg_dct', 'class_weights', 'target_threshold', 'data.repeats',
    'distill.teacher',
  }  # fmt: skip
  assert unlabelled | {'data.unlabelled'} == {f'data.{name}' for name in UNLABELLED_DEFAULTS}


def test_the_defaults_are_valid_and_every_number_that_can_be_wrong_has_a_range():
  assert validate(Config(steps=1)) == Config(steps=1)
  assert validate(Config(epochs=0.5)) == Config(epochs=0.5)
  numbers = {name for name, value in DEFAULTS.items() if type(value) in (int, float)}
  assert numbers - set(RANGES) == {'model.head_bias'}


# Settings that some choices need besides.
COMPANIONS = {
  'random': {'data.resize_before_crop': 256},
  'big_vision': {'data.randaug_ops': 2},
  'timm': {
    'data.randaug_ops': 2,
    'data.randaug_magnitude': 9.0,
    'data.train_interpolation': 'pil_random',
  },
  'noisystudent': {'data.randaug_ops': 2, 'data.randaug_magnitude': 27.0},
  'mean': {'loss': 'sigmoid'},
  'staircase': {'optim.lr_boundaries': '50%'},
  'uniform': {'model.drop_path': 0.1},
  'half_pixel': {'init': 'runs/a'},
  'keep': {'init': 'runs/a'},
  'probe': {'init': 'runs/a'},
  'bicubic': {'init': 'runs/a'},
  **{name: {'data.train': 'folder:a'} for name in ('exif', 'ignore', 'fast', 'accurate')},
}


@pytest.mark.parametrize('name', CHOICES)
def test_every_choice_is_accepted(name):
  for choice in CHOICES[name]:
    value = (choice,) if isinstance(DEFAULTS[name], tuple) else choice
    config = validate(changed({name: value} | COMPANIONS.get(choice, {})))
    assert flatten_config(config)[name] == value


def test_choices_and_implementations_are_the_same():
  tables = {
    'model.attention': {'auto', *ATTENTION_IMPLEMENTATIONS},
    'model.gelu': GELU_FUNCTIONS,
    'model.remat': REMAT_POLICIES,
    'data.randaug_variant': {*RANDAUGMENT_TABLES, 'timm'},
    'optim.name': UPDATE_RULES,
    'optim.schedule': LR_DECAYS,
    'loss': LOSSES,
    'sigmoid_reduction': REDUCTIONS,
    'mask.target': {'', *PATCH_TARGETS},
  }
  assert MASK_LOSSES.keys() == PATCH_TARGETS.keys()
  assert {name: set(table) for name, table in tables.items()} == {
    name: set(CHOICES[name]) for name in tables
  }


@pytest.mark.parametrize(
  ('size', 'expected'),
  [((224, 192), (224, 192)), ((28,), (28, 28)), (28, (28, 28)), ([32, 16], (32, 16))],
  ids=str,
)
def test_validation_completes_the_size_in_a_copy_of_the_config(size, expected):
  config = changed({'data.size': size})
  assert validate(config).data.size == expected
  assert config.data.size is size


# Settings that are wrong by themselves or together -> text that the error must have.
WRONG = [
  ({'data.crop': 'inceptoin'}, ["config.data.crop='inceptoin'", "'inception'"]),
  ({'data.bad_images': 'ignore'}, ["config.data.bad_images='ignore'", 'error, skip']),
  ({'data.size': (8, 8, 3)}, ['config.data.size=(8, 8, 3)']),
  ({'data.size': ()}, ['config.data.size=()']),
  ({'data.size': (0, 8)}, ['config.data.size=(0, 8)']),
  ({'data.size': -8}, ['config.data.size=(-8, -8)']),
  ({'init': 'a', 'init_head': 'probe', 'loss': 'sigmoid'}, ["config.init_head='probe'", 'loss']),
  (
    {'init': 'a', 'init_head': 'probe', 'model.hidden_head': True},
    ["config.init_head='probe'", 'config.model.hidden_head'],
  ),
  (
    {'data.randaug_ops': 2, 'data.randaug_variant': 'timm', 'data.randaug_magnitude': 9.0},
    ["config.data.randaug_variant='timm'", 'config.data.train_interpolation', 'pil_bicubic'],
  ),
  (
    {'data.randaug_ops': 2, 'data.randaug_variant': 'timm'},
    ['config.data.randaug_magnitude=0', 'up to 10'],
  ),
  (
    {'data.randaug_ops': 2, 'data.randaug_variant': 'timm', 'data.randaug_magnitude': 25.0},
    ['config.data.randaug_magnitude=25', 'up to 10'],
  ),
  (
    {'data.batch': 4, 'data.repeats': 4, 'cutmix': 1.0},
    ['config.data.batch=4', 'config.data.repeats=4'],
  ),
  (
    {'optim.sam_rho': 0.6, 'optim.sam_rho_min': 0.1, 'optim.lr': 1e-3, 'optim.lr_end': 1e-3},
    ['config.optim.sam_rho_min=0.1', 'config.optim.lr_end=0.001'],
  ),
  ({'data.repeats': 3}, ['config.data.batch=256', 'config.data.repeats=3']),
  ({'data.crop': 'random'}, ['config.data.resize_before_crop=0', '(224, 224)']),
  (
    {'data.unlabelled': 'images:a', 'data.unlabelled_ratio': 2},
    ['config.data.batch=256', 'config.data.unlabelled_ratio=2'],
  ),
  ({'optim.schedule': 'staircase'}, ["config.optim.schedule='staircase'", 'lr_boundary_every']),
  ({'data.crop_area': (0.0, 1.0)}, ['config.data.crop_area=(0.0, 1.0)']),
  ({'data.crop_area': (0.5, 0.4)}, ['config.data.crop_area=(0.5, 0.4)']),
  ({'data.crop_area': (0.5, 1.5)}, ['config.data.crop_area=(0.5, 1.5)']),
  ({'data.crop_area': (NAN, 1.0)}, ['config.data.crop_area=(nan, 1.0)']),
  ({'data.crop_aspect': (2.0, 1.0)}, ['config.data.crop_aspect=(2.0, 1.0)']),
  ({'data.crop_aspect': (-1.0, 1.0)}, ['config.data.crop_aspect=(-1.0, 1.0)']),
  (
    {'data.eval_crop': 'center', 'data.eval_short_side': 200},
    ['config.data.eval_short_side=200', '(224, 224)'],
  ),
  (
    {'data.eval_crop': 'center', 'data.eval_size': 288},
    ['config.data.eval_short_side=256', 'config.data.eval_size=(288, 288)'],
  ),
  ({'data.eval_size': (0, 8)}, ['config.data.eval_size=(0, 8)', 'or 0']),
  (
    {'data.eval_size': 288, 'model.position': 'learned2d'},
    ['config.data.eval_size=(288, 288)', "config.model.position='learned2d'"],
  ),
  (
    {'data.batch': 10, 'optim.grad_accum_steps': 4},
    ['config.data.batch=10', 'config.optim.grad_accum_steps=4'],
  ),
  ({'model.scale': (1.0, 0.0, 1.0)}, ['config.model.scale=(1.0, 0.0, 1.0)']),
  (
    {'optim.weight_decay': 0.1, 'optim.weight_decay_mask': '(kernel'},
    ["config.optim.weight_decay_mask='(kernel'"],
  ),
  (
    {'optim.sam_rho': 0.1, 'optim.sam_rho_min': 0.2},
    ['config.optim.sam_rho_min=0.2', 'config.optim.sam_rho=0.1'],
  ),
  ({'optim.freeze': '*'}, ["config.optim.freeze='*'"]),
  ({'optim.lr': math.inf}, ['config.optim.lr=inf']),
  ({'epochs': math.inf, 'steps': 0}, ['config.epochs=inf']),
  ({'steps': 0}, ['steps=0', 'epochs=0']),
  ({'epochs': 2.5}, ['steps=10', 'epochs=2.5']),
]


@pytest.mark.parametrize(('settings', 'parts'), WRONG, ids=[str(row[0]) for row in WRONG])
def test_a_wrong_value_raises_an_error_of_one_line_that_names_the_settings(settings, parts):
  with pytest.raises(UserError) as error:
    validate(changed(settings))
  assert all(part in str(error.value) for part in parts), str(error.value)
  assert '\n' not in str(error.value)


def test_a_crop_may_be_as_large_as_the_image_that_it_is_cut_from():
  crops = {'data.crop': 'random', 'data.resize_before_crop': 224, 'data.eval_crop': 'center'}
  assert validate(changed(crops | {'data.eval_short_side': 224}))
  for larger in ((224, 225), (225, 224)):
    with pytest.raises(UserError, match=r'config\.data\.resize_before_crop=224'):
      validate(changed(crops | {'data.size': larger}))


def test_every_choice_refuses_a_misspelled_value():
  for name, choices in CHOICES.items():
    with pytest.raises(UserError, match=re.escape(f"config.{name}='{choices[-1]}x'")):
      validate(changed({name: f'{choices[-1]}x'}))


@pytest.mark.parametrize('name', RANGES)
def test_a_number_outside_its_range_raises_an_error_that_names_the_range(name):
  low, high = RANGES[name]
  nan = [NAN] if setting_types(Config)[name] is float else []
  for value in (low - 1, *nan, *([high + 1] if high < math.inf else [])):
    with pytest.raises(UserError, match=re.escape(f'config.{name}={value}: ')) as error:
      validate(changed({name: value}))
    assert str(low) in str(error.value) and (high == math.inf or str(high) in str(error.value))


# Values of every type. A config file can contain any of them; flags are checked earlier.
ANYTHING = [
  None, True, 3, 3.5, '3', b'3', (), (1,), (1.0, 2.0, 3.0, 4.0), ('a', 'b'), ('a', 'b', 'c'),
  [1, 2], {}, object(), 1j,
]  # fmt: skip
FITS = {
  int: lambda value: type(value) is int,
  float: lambda value: type(value) in (int, float),
  str: lambda value: type(value) is str,
  bool: lambda value: type(value) is bool,
  tuple[str, ...]: lambda value: type(value) is tuple and all(type(part) is str for part in value),
}


def test_a_value_of_another_type_raises_an_error_that_names_the_setting():
  for name, kind in setting_types(Config).items():
    wrong = [value for value in ANYTHING if not FITS.get(kind, lambda value: False)(value)]
    if name in ('data.size', 'data.eval_size'):  # One number means a square.
      wrong = [value for value in wrong if value not in (3, (1,), [1, 2])]
    for value in wrong:
      with pytest.raises(UserError, match=re.escape(f'config.{name}=')):
        validate(changed({name: value}))


NUMBERS = [name for name, kind in setting_types(Config).items() if kind in (int, float)]


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
  st.sampled_from(NUMBERS),
  st.one_of(st.integers(), st.floats(), st.sampled_from([math.inf, -math.inf, NAN])),
)
def test_validation_accepts_a_number_or_raises_an_error_that_names_its_setting(name, value):
  low, high = RANGES.get(name, (-math.inf, math.inf))
  fits = low <= value <= high and math.isfinite(value)
  fits &= isinstance(value, int) or setting_types(Config)[name] is float
  try:
    validate(changed({name: value}))
  except UserError as error:
    assert name.rpartition('.')[2] in str(error) and '\n' not in str(error)
    # A number in its range is refused only because of another setting, which the error names too.
    assert not fits or str(error).count('config.') > 1 or 'epochs' in str(error)
  else:
    assert fits


def test_probes_are_any_number_of_texts():
  for entries in ((), ('knn:builtin:digits',), ('a', 'b', 'c')):
    assert validate(Config(steps=1, probes=entries)).probes == entries
  for wrong in ('knn:builtin:digits', ('a', 1), ['a']):
    with pytest.raises(UserError, match=r'config\.probes='):
      validate(Config(steps=1, probes=wrong))


@pytest.mark.parametrize(
  'text',
  ['5', '5:', ':5', '5:5', '6:5', '0:5', '-1:5', '1:5:2', '1.5:3', 'a:b', '1:200', '\u0663:\u0665'],
)
def test_a_bad_range_of_steps_to_trace_is_refused(text):
  with pytest.raises(UserError, match=f'config.profile={re.escape(repr(text))}'):
    validate(Config(steps=300, profile=text))


@pytest.mark.parametrize(
  ('given', 'names'),
  [
    ((), ()),
    (('',), ()),
    (('wandb,mlflow',), ('wandb', 'mlflow')),
    (('mlflow', 'mlflow'), ('mlflow',)),
  ],
)
def test_the_names_of_writers_may_be_separated_by_commas(given, names):
  assert validate(Config(steps=1, writers=given)).writers == names


def test_an_unknown_writer_is_refused_with_a_suggestion():
  with pytest.raises(UserError, match="config.writers='wandbb' .* Did you mean 'wandb'"):
    validate(Config(steps=1, writers=('mlflow', 'wandbb')))
