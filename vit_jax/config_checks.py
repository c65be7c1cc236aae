"""Validation of a config, before any device is touched.

Each setting has a type, and some have a list of choices or a range (settings/limits.py). Some are
read only together with others (settings/conditions.py). The checks here compare several settings.
"""

import dataclasses
import math
import re
import typing

from vit_jax.config import Config, ModelConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.conditions import settings_without_effect
from vit_jax.settings.fields import flatten_config, setting_types
from vit_jax.settings.limits import (
  CHANNELS,
  CHOICES,
  MAX_PROFILED_STEPS,
  RANGES,
  TIMM_INTERPOLATIONS,
)

UNRESAMPLED_POSITIONS = ('learned2d', 'relative')


def validate(config: Config) -> Config:
  """Return the config with `data.size` and `data.eval_size` as two numbers, and `writers` as names.

  Raises UserError that names the setting, its value, and what is expected.
  """
  config = validate_values(config)
  for name, (value, default, known) in settings_without_effect(config).items():
    raise UserError(
      f'config.{name}={value!r} has no effect here: it needs {known}. '
      f'Set that, or leave config.{name} at its default, {default!r}'
    )
  return config


def validate_values(config: Config) -> Config:
  """Validate a config as `validate` does, but accept settings that are without effect.

  An older version may have written such a config to a run directory.
  """
  sizes = {name: _as_two_numbers(getattr(config.data, name)) for name in ('size', 'eval_size')}
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, **sizes),
    writers=_split_names(config.writers),
    probes=_drop_empty(config.probes),
    model=_join_equal_channels(config.model),
  )
  values = flatten_config(config)
  _check_values(values)
  _check_data(config)
  _check_optim(config)
  _check_patterns(values)
  _check_probed_head(config)
  if bool(config.steps) == bool(config.epochs):
    got = f'steps={config.steps} and epochs={config.epochs:g}'
    raise UserError(
      f'{got}: set exactly one of them (--config.steps=0 or --config.epochs=0 unsets the other)'
    )
  check_channels(config.model)
  parse_step_range(config.profile)
  return config


def _as_two_numbers(size):
  """Return one number, or a sequence of one, as a tuple of two. Return other values as they are."""
  size = (size,) if type(size) is int else tuple(size) if isinstance(size, list) else size
  return size * 2 if isinstance(size, tuple) and len(size) == 1 else size


def _drop_empty(names: tuple[str, ...]) -> tuple[str, ...]:
  """Return () for ('',), which is what an empty flag gives."""
  return () if names == ('',) else names


def _split_names(names: tuple[str, ...]) -> tuple[str, ...]:
  """Return ('a', 'b') for ('a,b',), which is what the flag a,b gives, and () for ('',)."""
  if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
    return names
  return tuple(dict.fromkeys(filter(None, ','.join(names).split(','))))


def parse_step_range(text: str) -> range:
  """Return the steps of FIRST:END, without END, as in slices of Python; none for ''.

  Steps are counted from 1. Raises UserError for any other text.
  """
  if not text:
    return range(0)
  if not (match := re.fullmatch(r'(\d{1,12}):(\d{1,12})', text, re.ASCII)):
    raise UserError(f'config.profile={text!r}: expected FIRST:END, such as 100:105')
  first, end = map(int, match.groups())
  if not 0 < first < end:
    raise UserError(
      f'config.profile={text!r}: expected FIRST of at least 1 and END above it; it traces the '
      'steps FIRST to END - 1'
    )
  if end - first > MAX_PROFILED_STEPS:
    raise UserError(
      f'config.profile={text!r} has {end - first} steps; expected at most {MAX_PROFILED_STEPS}'
    )
  return range(first, end)


def _join_equal_channels(model: ModelConfig) -> ModelConfig:
  """Return a model of one channel with the one number of three equal ones, as the default has."""
  fields = {name: getattr(model, name) for name in ('mean', 'scale')}
  equal = {
    name: values[:1]
    for name, values in fields.items()
    if isinstance(values, tuple) and len(values) == 3 and len(set(values)) == 1
  }
  return dataclasses.replace(model, **equal) if model.channels == 1 else model


def check_channels(model: ModelConfig):
  """Raise UserError unless images have 1 or 3 channels, with a mean and a scale for each."""
  if model.channels not in CHANNELS:
    raise UserError(
      f'config.model.channels={model.channels}: expected 3 (RGB images) or 1 (grey images)'
    )
  for name in ('mean', 'scale'):
    values = getattr(model, name)
    if len(values) != model.channels:
      raise UserError(
        f'config.model.{name}={values} does not fit config.model.channels={model.channels}: '
        'expected a number for each channel'
      )
  if min(model.scale) <= 0:
    raise UserError(f'config.model.scale={model.scale}: expected positive numbers')


def _check_values(values: dict[str, object]):
  """Raise UserError for a value that has the wrong type, or is outside its choices or range."""
  types = setting_types(Config)
  for name, value in values.items():
    if not has_type(types[name], value):
      raise UserError(f'config.{name}={value!r:.80}: expected {format_type(types[name])}')
    for each in (value if isinstance(value, tuple) else (value,)) if name in CHOICES else ():
      if each not in CHOICES[name]:
        raise UserError(
          f'config.{name}={each!r} is not a choice.{did_you_mean(str(each), CHOICES[name])}'
        )
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if name in RANGES and not low <= value <= high:
      limits = f'from {low} to {high}' if high < math.inf else f'of at least {low}'
      raise UserError(f'config.{name}={value}: expected a number {limits}')
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
      raise UserError(f'config.{name}={value}: expected finite numbers')


def _check_data(config: Config):
  """Raise UserError for settings of the data that contradict one another."""
  data, parts = config.data, config.optim.grad_accum_steps
  if min(data.size) < 1:
    raise UserError(
      f'config.data.size={data.size}: expected HEIGHT,WIDTH in pixels, or one number for a square'
    )
  _check_eval_size(config)
  if data.unlabelled and data.batch % (1 + data.unlabelled_ratio):
    raise UserError(
      f'config.data.batch={data.batch} is not divisible into groups of 1 labelled image and '
      f'config.data.unlabelled_ratio={data.unlabelled_ratio} unlabelled images'
    )
  if data.batch % parts:
    raise UserError(
      f'config.data.batch={data.batch} is not divisible by config.optim.grad_accum_steps={parts}'
    )
  if not 0 < data.crop_area[0] <= data.crop_area[1] <= 1:
    raise UserError(f'config.data.crop_area={data.crop_area}: expected 0 < LOW <= HIGH <= 1')
  if not 0 < data.crop_aspect[0] <= data.crop_aspect[1]:
    raise UserError(f'config.data.crop_aspect={data.crop_aspect}: expected 0 < LOW <= HIGH')
  cropped_of = 'eval_size' if any(data.eval_size) else 'size'
  for side, name, cropped in (
    ('resize_before_crop', 'size', data.crop == 'random'),
    ('eval_short_side', cropped_of, data.eval_crop in ('center', 'squash')),
  ):
    if cropped and getattr(data, side) < max(getattr(data, name)):
      raise UserError(
        f'config.data.{side}={getattr(data, side)} is less than the size of the crop, '
        f'config.data.{name}={getattr(data, name)}'
      )
  if data.batch % data.repeats:
    raise UserError(
      f'config.data.batch={data.batch} is not divisible by config.data.repeats={data.repeats}'
    )
  if (config.mixup or config.cutmix) and 1 < data.repeats > data.batch // 2:
    raise UserError(
      f'config.data.batch={data.batch} has one example and its config.data.repeats={data.repeats} '
      'copies, which mixup or CutMix would blend with one another'
    )
  if data.randaug_ops and data.randaug_variant == 'timm':
    _check_timm_randaugment(config)


def _check_eval_size(config: Config):
  """Raise UserError for a size of evaluation that is not valid, or that the model cannot have."""
  data = config.data
  if data.eval_size != (0, 0) and min(data.eval_size) < 1:
    raise UserError(
      f'config.data.eval_size={data.eval_size}: expected HEIGHT,WIDTH in pixels, one number for a '
      'square, or 0 for config.data.size'
    )
  if data.eval_image_size != data.size and config.model.position in UNRESAMPLED_POSITIONS:
    raise UserError(
      f'config.data.eval_size={data.eval_size}: the positions of '
      f'config.model.position={config.model.position!r} cannot be resampled'
    )


def _check_timm_randaugment(config: Config):
  """Raise UserError for a magnitude or an interpolation that timm's RandAugment does not have."""
  data = config.data
  if not 0 < data.randaug_magnitude <= 10:
    raise UserError(
      f"config.data.randaug_magnitude={data.randaug_magnitude:g}: with randaug_variant='timm', "
      'whose magnitudes end at 10, expected a number above 0 and up to 10'
    )
  interpolation = data.train_interpolation or data.interpolation
  if interpolation not in TIMM_INTERPOLATIONS:
    raise UserError(
      "config.data.randaug_variant='timm' moves pixels with the interpolation of training images, "
      f'which is {interpolation!r}; set config.data.train_interpolation to one of '
      + ', '.join(TIMM_INTERPOLATIONS)
    )


def _check_optim(config: Config):
  """Raise UserError for settings of the optimizer that contradict one another."""
  optim = config.optim
  falls = optim.lr_boundaries or optim.lr_boundary_every != '0'
  if optim.schedule == 'staircase' and not falls:
    raise UserError(
      "config.optim.schedule='staircase' needs config.optim.lr_boundaries or "
      'config.optim.lr_boundary_every'
    )
  if optim.sam_rho_min > optim.sam_rho:
    raise UserError(
      f'config.optim.sam_rho_min={optim.sam_rho_min:g} is above '
      f'config.optim.sam_rho={optim.sam_rho:g}'
    )
  if optim.sam_rho_min and optim.lr <= optim.lr_end:
    raise UserError(
      f'config.optim.sam_rho_min={optim.sam_rho_min:g} is reached as the learning rate falls, but '
      f'config.optim.lr={optim.lr:g} does not fall to config.optim.lr_end={optim.lr_end:g}'
    )


def _check_patterns(values: dict[str, object]):
  """Raise UserError for a setting that is not the regular expression that it should be."""
  for name in ('optim.weight_decay_mask', 'optim.freeze', 'lora.targets', 'lora.train'):
    try:
      re.compile(values[name])
    except re.error as error:
      raise UserError(
        f'config.{name}={values[name]!r} is not a regular expression: {error}'
      ) from None


def _check_probed_head(config: Config):
  """Raise UserError unless a linear probe can be the head: linear, and trained with softmax."""
  for name, value in {'model.hidden_head': config.model.hidden_head, 'loss': config.loss}.items():
    if config.init_head == 'probe' and value not in (False, 'softmax'):
      raise UserError(
        f"config.init_head='probe' fits a linear layer with the softmax loss, but config.{name} is "
        f'{value!r}; --config.init_head=new starts a head of zeros'
      )


def has_type(kind: type, value) -> bool:
  """Return whether `value` has the type. An int is also a float, but a bool is not a number."""
  if parts := typing.get_args(kind):
    if not isinstance(value, tuple):
      return False
    parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
    return len(value) == len(parts) and all(map(has_type, parts, value))
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, (int, float) if kind is float else kind)


def format_type(kind: type) -> str:
  """Return a name of the type for error messages."""
  parts = typing.get_args(kind)
  if parts and parts[-1] is Ellipsis:
    kind = 'texts' if parts[0] is str else 'numbers'
    return f'{kind} in parentheses, any number of them'
  if parts:
    return f'{len(parts)} {"whole numbers" if parts[0] is int else "numbers"}'
  return {int: 'a whole number', float: 'a number', str: 'text', bool: 'True or False'}[kind]
