"""The conditions under which a setting is read. Elsewhere it must have its default."""

import re
from typing import NamedTuple

from vit_jax.config import Config
from vit_jax.settings.fields import flatten_config


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
ENCODED = Pattern('^(folder|csv|images|tfds|vtab|records|tar|parquet):', 'folder:PATH')
ENCODED_PROBE = Pattern(
  '^[^:]*$|:(folder|csv|images|tfds|vtab|records|tar|parquet):', 'fewshot:folder:PATH'
)
ENCODED_SOURCES = {
  'data.train': ENCODED, 'data.eval': ENCODED, 'data.unlabelled': ENCODED, 'probes': ENCODED_PROBE,
}  # fmt: skip
TFDS_PROBE = Pattern('^[^:]*$|:(tfds|vtab):', 'fewshot:tfds:NAME')  # Without a source: its default.
FEWSHOT_PROBE = Pattern('^fewshot:', 'fewshot:SOURCE')
NO_MASK = {'mask.target': ('',)}
# Positions with a table that is resampled as `init_positions` says. Offsets have one way.
POSITION_TABLES = ('learned', 'learned+rope')
LABELS_COUNT = {'distill.teacher': ('',), 'distill.weight': ENABLED}  # In the loss.
ROPE = {'model.position': ('rope', 'learned+rope')}

# Setting -> the requirements under which it is read. All of them must hold. A requirement holds if
# one of its settings matches. A setting that is not read must have its default.
# `models/families.py` does the same for the settings of each family of models.
READ_ONLY_WHEN: dict[str, tuple[Requirement, ...]] = {
  'data.dir': (
    {'data.train': TFDS, 'data.eval': TFDS, 'data.unlabelled': TFDS, 'probes': TFDS_PROBE},
  ),
  'data.crop_area': ({'data.crop': ('inception', 'random_resized')},),
  'data.crop_aspect': ({'data.crop': ('inception', 'random_resized')},),
  'data.resize_before_crop': ({'data.crop': ('random',)},),
  'data.randaug_magnitude': ({'data.randaug_ops': ENABLED},),
  'data.randaug_variant': ({'data.randaug_ops': ENABLED},),
  'data.repeats': ({'data.unlabelled': ('',)},),
  'data.eval_size': (NO_MASK,),
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
  'model.distillation_token': ({'model.pool': ('token',)},),
  'model.drop_path_schedule': ({'model.drop_path': ENABLED},),
  'model.rope_theta': (ROPE,),
  'model.rope_grid': (ROPE,),
  'model.rope_register_theta': (ROPE, {'model.registers': ENABLED}),
  'model.gelu': ({'model.swiglu': (False,), 'model.pool': ('map',)},),
  'model.hidden_head': (NO_MASK,),
  'model.head_bias': (NO_MASK,),
  'optim.lr_end': ({'optim.schedule': ('cosine', 'linear'), 'optim.cooldown': ENABLED},),
  'optim.rsqrt_timescale': ({'optim.schedule': ('rsqrt',)},),
  'optim.lr_boundaries': ({'optim.schedule': ('staircase',)},),
  'optim.lr_boundary_every': ({'optim.schedule': ('staircase',)},),
  'optim.lr_boundary_factor': ({'optim.schedule': ('staircase',)},),
  'optim.b2': ({'optim.name': ('adamw', 'adafactor', 'rmsprop', 'lamb', 'lion', 'muon')},),
  'optim.muon_momentum': ({'optim.name': ('muon',)},),
  'optim.weight_decay_mask': ({'optim.weight_decay': ENABLED, 'optim.name': ('lamb',)},),
  'optim.freeze': ({'lora.rank': (0,)},),
  'optim.coupled_weight_decay': ({'optim.weight_decay': ENABLED},),
  'optim.head_weight_decay_factor': (
    {'optim.weight_decay': ENABLED},
    {'optim.coupled_weight_decay': (False,)},
  ),
  'optim.spike_window': ({'optim.skip_spikes': ENABLED},),
  'optim.sam_rho_min': (
    {'optim.sam_rho': ENABLED},
    {
      'optim.schedule': ('cosine', 'linear', 'rsqrt', 'staircase'),
      'optim.warmup': ENABLED,
      'optim.cooldown': ENABLED,
    },
  ),
  'optim.gsam_alpha': ({'optim.sam_rho': ENABLED},),
  'mask.rate': ({'mask.target': ENABLED},),
  'lora.rank': ({'init': ENABLED}, NO_MASK),
  'lora.alpha': ({'lora.rank': ENABLED},),
  'lora.targets': ({'lora.rank': ENABLED},),
  'lora.train': ({'lora.rank': ENABLED},),
  'distill.teacher': (NO_MASK, {'loss': ('softmax',)}, {'data.unlabelled': ('',)}),
  'distill.variant': ({'distill.teacher': ENABLED},),
  'distill.temperature': ({'distill.teacher': ENABLED},),
  'distill.weight': ({'distill.teacher': ENABLED},),
  'loss': (NO_MASK,),
  'sigmoid_reduction': ({'loss': ('sigmoid',)},),
  'target_threshold': ({'loss': ('sigmoid',)}, {'data.unlabelled': ('',)}),
  'class_weights': (NO_MASK, {'loss': ('softmax',)}, {'data.unlabelled': ('',)}, LABELS_COUNT),
  'label_smoothing': (NO_MASK, {'target_threshold': (0.0,)}, LABELS_COUNT),
  'mixup': (NO_MASK,),
  'cutmix': (NO_MASK,),
  'cutmix_probability': ({'cutmix': ENABLED}, {'mixup': ENABLED}),
  'init_positions': (
    {'init': ENABLED, 'data.eval_size': ENABLED},
    {'model.position': POSITION_TABLES},
  ),
  'init_head': ({'init': ENABLED}, NO_MASK),
  'probe_every': ({'probes': ENABLED},),
  'fewshot_l2': ({'probes': FEWSHOT_PROBE},),
}


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
