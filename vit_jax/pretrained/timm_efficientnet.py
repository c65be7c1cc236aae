"""timm's names of EfficientNets (`tf_efficientnet_*`, Noisy Student's among them) to our tree, and files in our own names."""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import LazyArrays
from vit_jax.pretrained.timm_vit import read_timm_preprocessing

TIMM_STEM_WEIGHT, EFFICIENTNET_STEM_KERNEL = 'conv_stem.weight', 'stem_conv/kernel'
EFFICIENTNET_TOP_NAMES = {
  'conv_stem': 'stem_conv',
  'bn1': 'stem_norm',
  'conv_head': 'top_conv',
  'bn2': 'top_norm',
  'classifier': 'head',
}
# Of a block. The first stage's, which do not expand, have other names for what others have.
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
BATCH_NORM_NAMES = {
  'weight': 'scale',
  'bias': 'bias',
  'running_mean': 'running_mean',
  'running_var': 'running_var',
}
IMAGENET_PREPROCESSING = {
  'mean': (123.675, 116.28, 103.53),
  'scale': (58.395, 57.12, 57.375),
  'crop': 'center',
}


def is_efficientnet(arrays: LazyArrays) -> bool:
  """Whether the names are those of an EfficientNet, timm's or ours."""
  return TIMM_STEM_WEIGHT in arrays or EFFICIENTNET_STEM_KERNEL in arrays


def read_efficientnet(
  arrays: LazyArrays, config: dict | None
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of the arrays and of timm's config.json.

  UserError for a name that no EfficientNet has.
  """
  if EFFICIENTNET_STEM_KERNEL in arrays:
    return {name: arrays[name] for name in arrays}, {'assumed': ()}
  names = [name for name in arrays if not name.endswith('num_batches_tracked')]
  flat = {
    from_timm_efficientnet_name(name, arrays.source): transpose_timm_kernel(name, arrays[name])
    for name in names
  }
  facts = IMAGENET_PREPROCESSING | read_timm_preprocessing(config or {}, {})
  return flat, facts | {'assumed': () if config else tuple(IMAGENET_PREPROCESSING)}


def from_timm_efficientnet_name(name: str, source: str) -> str:
  """Of one of timm's arrays."""
  module, _, leaf = name.rpartition('.')
  place, table = '', EFFICIENTNET_TOP_NAMES
  if match := re.match(r'blocks\.(\d+)\.(\d+)\.', name):
    place = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}/'
    module, table = (
      module.removeprefix(match[0]),
      EFFICIENTNET_BLOCK_NAMES if int(match[1]) else EFFICIENTNET_FIRST_STAGE_NAMES,
    )
  if module not in table:
    raise UserError(f'{source}: {name} is in no EfficientNet that is known here')
  layer = table[module]
  inside = (
    BATCH_NORM_NAMES.get(leaf, leaf)
    if layer.endswith('norm')
    else {'weight': 'kernel'}.get(leaf, leaf)
  )
  return f'{place}{layer}/{inside}'


def transpose_timm_kernel(name: str, array: np.ndarray) -> np.ndarray:
  """Kernels with their outputs last."""
  return (
    array.transpose(2, 3, 1, 0)
    if array.ndim == 4
    else array.T
    if name == 'classifier.weight'
    else array
  )
