"""Validation of a config, before any device is touched.

Each setting has a type, and some have a list of choices or a range. `READ_ONLY_WHEN` lists the
settings that only some configs read. The other checks compare several settings.
"""

import dataclasses
import math
import re
import typing
from typing import NamedTuple

from vit_jax.config import Config, ModelConfig, flatten_config, setting_types
from vit_jax.errors import UserError, did_you_mean

CHANNELS = (1, 3)  # Of an image: grey or RGB.
CHOICES = {
  'data.crop': ('inception', 'resize', 'random'),
  'data.randaug_variant': ('intended', 'noisystudent'),
  'data.eval_crop': ('resize', 'center', 'squash', 'border', 'none'),
  'data.interpolation': (
    'tf_bilinear', 'tf_area', 'pil_nearest', 'pil_bilinear', 'pil_bicubic', 'pil_lanczos',
    'pil_box', 'pil_hamming',
  ),
  'data.orient': ('auto', 'exif', 'ignore'),
  'data.jpeg_dct': ('auto', 'fast', 'accurate'),
  'data.bad_images': ('error', 'skip'),
  'model.pool': ('token', 'gap', 'map'),
  'model.position': ('learned', 'learned2d', 'relative', 'sincos2d', 'none', 'rope'),
  'model.position_at': ('stem', 'every', 'shared'),
  'model.attention': ('auto', 'xla', 'pallas', 'cudnn'),
  'model.qkv_bias': ('qkv', 'qv', 'none'),
  'model.gelu': ('tanh', 'erf', 'quick'),
  'model.dtype': ('float32', 'bfloat16'),
  'model.remat': ('none', 'vit', 'dots', 'full'),
  'mask.target': ('', 'colour', 'grid', 'pixels'),
  'optim.name': ('adamw', 'sgd', 'adafactor', 'rmsprop'),
  'optim.schedule': ('cosine', 'linear', 'rsqrt', 'constant', 'staircase'),
  'optim.momentum_dtype': ('float32', 'bfloat16'),
  'optim.grad_dtype': ('float32', 'bfloat16'),
  'loss': ('softmax', 'sigmoid'),
  'init_positions': ('corner', 'half_pixel', 'bicubic'),
  'init_head': ('new', 'keep', 'probe'),
  'class_weights': ('none', 'balanced'),
}  # fmt: skip

# Closed ranges. Any finite number is valid for a setting that is not listed.
RANGES = {
  'data.unlabelled_ratio': (1, 1000),
  'data.confidence_threshold': (0, 1),
  'data.unlabelled_per_class': (1, math.inf),
  'data.batch': (1, math.inf),
  'data.eval_batch': (0, math.inf),
  'data.randaug_ops': (0, 7),
  'data.randaug_magnitude': (0, 30),
  'data.resize_before_crop': (0, math.inf),
  'data.eval_short_side': (1, 32768),
  'data.max_bad_fraction': (0, 1),
  'data.max_pixels': (1, math.inf),
  'data.workers': (0, 1024),
  'data.threads': (0, 1024),
  'data.prefetch': (1, 64),
  'model.channels': (1, 3),
  'model.width': (0, math.inf),
  'model.depth': (0, math.inf),
  'model.mlp': (0, math.inf),
  'model.heads': (0, math.inf),
  'model.stem_width': (32, math.inf),
  'model.rope_theta': (1, math.inf),
  'model.registers': (0, math.inf),
  'model.layer_scale': (0, 1),
  'model.dropout': (0, 0.99),
  'model.drop_path': (0, 0.99),
  'model.norm_eps': (0, 1),
  'model.unroll': (0, math.inf),
  'optim.lr': (0, math.inf),
  'optim.lr_end': (0, math.inf),
  'optim.rsqrt_timescale': (1, math.inf),
  'optim.lr_boundary_factor': (0, 1),
  'optim.norm_momentum': (0, 0.99999),
  'optim.b1': (0, 0.99999),
  'optim.b2': (0, 0.99999),
  'optim.weight_decay': (0, math.inf),
  'optim.head_weight_decay_factor': (0, math.inf),
  'optim.grad_clip_norm': (0, math.inf),
  'optim.layer_decay': (0.01, 1),
  'optim.ema': (0, 0.999999),
  'optim.grad_accum_steps': (1, math.inf),
  'optim.skip_spikes': (0, math.inf),
  'optim.spike_window': (2, math.inf),
  'optim.max_bad_steps': (1, math.inf),
  'mesh.fsdp': (1, math.inf),
  'mask.rate': (0.001, 1),
  'lora.rank': (0, math.inf),
  'lora.alpha': (1e-6, math.inf),
  'steps': (0, math.inf),
  'epochs': (0, math.inf),
  'seed': (0, 2**31 - 1),
  'label_smoothing': (0, 0.99),
  'mixup': (0, math.inf),
  'fewshot_l2': (1e-9, math.inf),
  'max_to_keep': (1, math.inf),
  'first_step_timeout': (0, 604800),
  'step_timeout': (0, 604800),
}


class Pattern(NamedTuple):
  """Matches text in which the regular expression occurs, or a tuple with such text in it."""

  regex: str
  example: str


class NotDefault(NamedTuple):
  """Matches every value but the default."""


Requirement = dict[str, tuple | Pattern | NotDefault]

ENABLED = NotDefault()
TFDS = Pattern('^(tfds|vtab):', 'tfds:NAME')
# Sources of image files. Those that are built in have arrays.
ENCODED = Pattern('^(folder|csv|images|tfds|vtab):', 'folder:PATH')
ENCODED_PROBE = Pattern('^[^:]*$|:(folder|csv|images|tfds|vtab):', 'fewshot:folder:PATH')
ENCODED_SOURCES = {
  'data.train': ENCODED, 'data.eval': ENCODED, 'data.unlabelled': ENCODED, 'probes': ENCODED_PROBE,
}  # fmt: skip
TFDS_PROBE = Pattern('^[^:]*$|:(tfds|vtab):', 'fewshot:tfds:NAME')  # Without a source: its default.
FEWSHOT_PROBE = Pattern('^fewshot:', 'fewshot:SOURCE')
NO_MASK = {'mask.target': ('',)}

# Setting -> the requirements under which it is read. All of them must hold. A requirement holds if
# one of its settings matches. A setting that is not read must have its default.
# `models/families.py` does the same for the settings of each family of models.
READ_ONLY_WHEN: dict[str, tuple[Requirement, ...]] = {
  'data.dir': (
    {'data.train': TFDS, 'data.eval': TFDS, 'data.unlabelled': TFDS, 'probes': TFDS_PROBE},
  ),
  'data.crop_area': ({'data.crop': ('inception',)},),
  'data.crop_aspect': ({'data.crop': ('inception',)},),
  'data.resize_before_crop': ({'data.crop': ('random',)},),
  'data.randaug_magnitude': ({'data.randaug_ops': ENABLED},),
  'data.randaug_variant': ({'data.randaug_ops': ENABLED},),
  'data.eval_short_side': ({'data.eval_crop': ('center', 'squash', 'border')},),
  'data.orient': (ENCODED_SOURCES,),
  'data.jpeg_dct': (ENCODED_SOURCES,),
  'data.max_bad_fraction': ({'data.bad_images': ('skip',)},),
  'data.unlabelled': (NO_MASK,),
  'data.unlabelled_split': ({'data.unlabelled': ENABLED},),
  'data.unlabelled_ratio': ({'data.unlabelled': ENABLED},),
  'data.pseudo_labels': ({'data.unlabelled': ENABLED},),
  'data.confidence_threshold': ({'data.unlabelled': ENABLED},),
  'data.unlabelled_per_class': ({'data.unlabelled': ENABLED},),
  'model.class_token': ({'model.pool': ('gap',)},),
  'model.fc_norm': ({'model.pool': ('gap',)}, NO_MASK),
  'model.rope_theta': ({'model.position': ('rope',)},),
  'model.gelu': ({'model.swiglu': (False,), 'model.pool': ('map',)},),
  'model.hidden_head': (NO_MASK,),
  'model.head_bias': (NO_MASK,),
  'optim.lr_end': ({'optim.schedule': ('cosine', 'linear'), 'optim.cooldown': ENABLED},),
  'optim.rsqrt_timescale': ({'optim.schedule': ('rsqrt',)},),
  'optim.lr_boundaries': ({'optim.schedule': ('staircase',)},),
  'optim.lr_boundary_every': ({'optim.schedule': ('staircase',)},),
  'optim.lr_boundary_factor': ({'optim.schedule': ('staircase',)},),
  'optim.b2': ({'optim.name': ('adamw', 'adafactor', 'rmsprop')},),
  'optim.weight_decay_mask': ({'optim.weight_decay': ENABLED},),
  'optim.freeze': ({'lora.rank': (0,)},),
  'optim.coupled_weight_decay': ({'optim.weight_decay': ENABLED},),
  'optim.head_weight_decay_factor': (
    {'optim.weight_decay': ENABLED},
    {'optim.coupled_weight_decay': (False,)},
  ),
  'optim.spike_window': ({'optim.skip_spikes': ENABLED},),
  'mask.rate': ({'mask.target': ENABLED},),
  'lora.rank': ({'init': ENABLED}, NO_MASK),
  'lora.alpha': ({'lora.rank': ENABLED},),
  'lora.targets': ({'lora.rank': ENABLED},),
  'lora.train': ({'lora.rank': ENABLED},),
  'loss': (NO_MASK,),
  'class_weights': (NO_MASK, {'loss': ('softmax',)}, {'data.unlabelled': ('',)}),
  'label_smoothing': (NO_MASK,),
  'mixup': (NO_MASK,),
  'init_positions': ({'init': ENABLED},),
  'init_head': ({'init': ENABLED}, NO_MASK),
  'probe_every': ({'probes': ENABLED},),
  'fewshot_l2': ({'probes': FEWSHOT_PROBE},),
}


def validate(config: Config) -> Config:
  """Return the config with `data.size` as two numbers.

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
  size = config.data.size
  size = (size,) if type(size) is int else tuple(size) if isinstance(size, list) else size
  size = size * 2 if isinstance(size, tuple) and len(size) == 1 else size
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, size=size),
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
  return config


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
    if name in CHOICES and value not in CHOICES[name]:
      raise UserError(
        f'config.{name}={value!r} is not a choice.{did_you_mean(str(value), CHOICES[name])}'
      )
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if name in RANGES and not low <= value <= high:
      limits = f'from {low} to {high}' if high < math.inf else f'of at least {low}'
      raise UserError(f'config.{name}={value}: expected a number {limits}')
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
      raise UserError(f'config.{name}={value}: expected finite numbers')


def settings_without_effect(config: Config) -> dict[str, tuple[object, object, str]]:
  """Return {setting: (value, default, what it would need)} of settings that are not read.

  Settings at their default are left out.
  """
  values, defaults, found = flatten_config(config), flatten_config(Config()), {}
  for name, requirements in READ_ONLY_WHEN.items():
    for needs in requirements if values[name] != defaults[name] else ():
      if any(_matches(values[other], need, defaults[other]) for other, need in needs.items()):
        continue
      known = [_format_need(other, need, defaults[other]) for other, need in needs.items()]
      found[name] = values[name], defaults[name], ' or '.join(known)
  return found


def _matches(value, need: tuple | Pattern | NotDefault, default) -> bool:
  if isinstance(need, NotDefault):
    return value != default
  if isinstance(need, Pattern):
    texts = value if isinstance(value, tuple) else (value,)
    return any(re.search(need.regex, text) for text in texts)
  return value in need


def _format_need(name: str, need: tuple | Pattern | NotDefault, default) -> str:
  if isinstance(need, NotDefault):
    return f'config.{name} other than {default!r}'
  if isinstance(need, Pattern):
    return f'config.{name} such as {need.example!r}'
  return ' or '.join(f'config.{name}={value!r}' for value in need)


def _check_data(config: Config):
  """Raise UserError for settings of the data that contradict one another."""
  data, parts = config.data, config.optim.grad_accum_steps
  if min(data.size) < 1:
    raise UserError(
      f'config.data.size={data.size}: expected HEIGHT,WIDTH in pixels, or one number for a square'
    )
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
  for side, cropped in (
    ('resize_before_crop', data.crop == 'random'),
    ('eval_short_side', data.eval_crop in ('center', 'squash')),
  ):
    if cropped and getattr(data, side) < max(data.size):
      raise UserError(
        f'config.data.{side}={getattr(data, side)} is less than the size of the crop, '
        f'config.data.size={data.size}'
      )
  if data.randaug_ops and not data.randaug_magnitude:
    raise UserError(
      f'config.data.randaug_ops={data.randaug_ops} needs config.data.randaug_magnitude, which is 0'
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
