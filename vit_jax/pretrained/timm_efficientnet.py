"""Convert timm's EfficientNets (`tf_efficientnet_*`, `efficientnet_*`) to our parameter tree.

Both kinds have the same arrays. They differ in padding and in the epsilon of the norms, so that
only config.json says which one a file is. Files that `export` wrote in our own names are read too.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.efficientnet_variants import (
  EFFICIENTNET_PREFIX,
  EFFICIENTNET_SCALES,
  TORCH_SUFFIX,
)
from vit_jax.pretrained.arrays import EFFICIENTNET_STEM_KERNEL, LazyArrays
from vit_jax.pretrained.config_fields import read_field
from vit_jax.pretrained.timm_config import check_arguments, read_architecture
from vit_jax.pretrained.timm_preprocessing import TIMM_DEFAULTS, read_timm_preprocessing

TIMM_STEM_WEIGHT = 'conv_stem.weight'
EFFICIENTNET_TOP_NAMES = {
  'conv_stem': 'stem_conv',
  'bn1': 'stem_norm',
  'conv_head': 'top_conv',
  'bn2': 'top_norm',
  'classifier': 'head',
}
# Layers of a block. Blocks of the first stage do not expand, so that the same timm names mean other
# layers.
EFFICIENTNET_BLOCK_NAMES = {
  'conv_pw': 'expand',
  'bn1': 'expand_norm',
  'conv_dw': 'depthwise',
  'bn2': 'depthwise_norm',
  'se.conv_reduce': 'squeeze',
  'se.conv_expand': 'excite',
  'conv_pwl': 'project',
  'bn3': 'project_norm',
}
EFFICIENTNET_FIRST_STAGE_NAMES = EFFICIENTNET_BLOCK_NAMES | {
  'bn1': 'depthwise_norm',
  'conv_pw': 'project',
  'bn2': 'project_norm',
}
BATCH_NORM_NAMES = {'weight': 'scale'}
KERNEL_NAMES = {'weight': 'kernel'}
# timm's names of EfficientNets -> ours (timm 1.0.31, models/efficientnet.py).
TIMM_EFFICIENTNETS = {
  f'{prefix}efficientnet_{name.lower()}': f'{EFFICIENTNET_PREFIX}{name}{suffix}'
  for name in EFFICIENTNET_SCALES
  for prefix, suffix in (('tf_', ''), ('', TORCH_SUFFIX))
}
# Endings of older names, which say how a model was trained: efficientnet_b3a, tf_…_ns.
OLD_ENDINGS = re.compile(r'(?<=b[23])a|_ap|_ns(_475)?')


def is_efficientnet(arrays: LazyArrays) -> bool:
  """Return whether a file contains an EfficientNet, in timm's names or ours."""
  return TIMM_STEM_WEIGHT in arrays or EFFICIENTNET_STEM_KERNEL in arrays


def read_efficientnet(
  arrays: LazyArrays, config: dict | None
) -> tuple[dict[str, np.ndarray], dict]:
  """Read an EfficientNet and timm's config.json, and return its flat tree and facts.

  Raises UserError if config.json does not name an EfficientNet that is supported, and for an array
  that no EfficientNet has.
  """
  if EFFICIENTNET_STEM_KERNEL in arrays:
    return {name: arrays[name] for name in arrays}, {'assumed': ('variant',)}
  variant = read_timm_variant(config or {}, arrays.source)
  flat = {
    from_timm_efficientnet_name(name, arrays.source): transpose_timm_kernel(name, arrays[name])
    for name in arrays
    if not name.endswith('num_batches_tracked')
  }
  facts = read_timm_preprocessing(config or {}, {}, TIMM_DEFAULTS)
  return flat, facts | {'variant': variant}


def read_timm_variant(config: dict, source: str) -> str:
  """Return our name of the EfficientNet that timm's config.json names.

  Raises UserError if it names none, or changes it in a way that is not supported.
  """
  architecture = name = read_architecture(config)
  if not name:
    raise UserError(
      f'{source}: an EfficientNet pads and normalizes as in TensorFlow or as in PyTorch, which its '
      "arrays do not show. Write timm's name of the model into config.json beside it: "
      '{"architecture": "tf_efficientnet_b0"} or {"architecture": "efficientnet_b0"}'
    )
  if (ending := OLD_ENDINGS.search(name)) and ending.end() == len(name):
    name = name[: ending.start()]
  if name not in TIMM_EFFICIENTNETS:
    known = ', '.join(name.lower() for name in EFFICIENTNET_SCALES)
    raise UserError(
      f'{source}: config.json has architecture={architecture!r}, which is not supported; supported '
      f'are efficientnet_SIZE and tf_efficientnet_SIZE with SIZE one of {known}'
    )
  arguments = read_field(config, 'model_args', dict) or {}
  pool = read_field(arguments, 'global_pool', str) or read_field(config, 'global_pool', str)
  if pool not in (None, '', 'avg'):
    raise UserError(f"{source}: config.json has global_pool={pool!r}, only 'avg' is supported")
  check_arguments(arguments, ('global_pool',), source)
  return TIMM_EFFICIENTNETS[name]


def from_timm_efficientnet_name(name: str, source: str) -> str:
  """Return our name of one of timm's arrays."""
  module, _, leaf = name.rpartition('.')
  prefix, layers = '', EFFICIENTNET_TOP_NAMES
  if match := re.match(r'blocks\.(\d+)\.(\d+)\.', name):
    stage, unit = int(match[1]), int(match[2])
    prefix = f'block{stage + 1}/unit{unit + 1}/'
    module = module.removeprefix(match[0])
    layers = EFFICIENTNET_BLOCK_NAMES if stage else EFFICIENTNET_FIRST_STAGE_NAMES
  if module not in layers:
    raise UserError(f'{source}: no supported EfficientNet has {name}')
  layer = layers[module]
  leaves = BATCH_NORM_NAMES if layer.endswith('norm') else KERNEL_NAMES
  return f'{prefix}{layer}/{leaves.get(leaf, leaf)}'


def transpose_timm_kernel(name: str, array: np.ndarray) -> np.ndarray:
  """Move the output channels of a kernel to its last axis, and return other arrays unchanged."""
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  return array.T if name == 'classifier.weight' else array
