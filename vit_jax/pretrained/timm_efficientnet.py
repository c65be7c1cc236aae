"""Convert timm's EfficientNets (`tf_efficientnet_*`, Noisy Student) to our parameter tree.

Files that `export` wrote in our own names are read too.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import EFFICIENTNET_STEM_KERNEL, LazyArrays
from vit_jax.pretrained.preprocessing import describe_assumed_steps
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


def is_efficientnet(arrays: LazyArrays) -> bool:
  """Return whether a file contains an EfficientNet, in timm's names or ours."""
  return TIMM_STEM_WEIGHT in arrays or EFFICIENTNET_STEM_KERNEL in arrays


def read_efficientnet(
  arrays: LazyArrays, config: dict | None
) -> tuple[dict[str, np.ndarray], dict]:
  """Read an EfficientNet and timm's config.json, and return its flat tree and facts.

  Raises UserError for an array that no EfficientNet has.
  """
  if EFFICIENTNET_STEM_KERNEL in arrays:
    return {name: arrays[name] for name in arrays}, {'assumed': ()}
  flat = {
    from_timm_efficientnet_name(name, arrays.source): transpose_timm_kernel(name, arrays[name])
    for name in arrays
    if not name.endswith('num_batches_tracked')
  }
  facts = read_timm_preprocessing(config or {}, {}, TIMM_DEFAULTS)
  notes = () if config else (describe_assumed_steps(facts, 'config.json'),)
  return flat, facts | {'notes': notes}


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
