"""timm's names of EfficientNets (`tf_efficientnet_*`, Noisy Student's among them) to our tree, and files in our own names."""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.timm_names import image_facts

KEY, OURS = 'conv_stem.weight', 'stem_conv/kernel'
TOP = {
  'conv_stem': 'stem_conv',
  'bn1': 'stem_norm',
  'conv_head': 'top_conv',
  'bn2': 'top_norm',
  'classifier': 'head',
}
# Of a block. The first stage's, which do not expand, have other names for what others have.
BLOCK = {
  'conv_pw': 'expand',
  'bn1': 'expand_norm',
  'conv_dw': 'depthwise',
  'bn2': 'depthwise_norm',
  'se.conv_reduce': 'squeeze',
  'se.conv_expand': 'excite',
  'conv_pwl': 'project',
  'bn3': 'project_norm',
}
FIRST = BLOCK | {'bn1': 'depthwise_norm', 'conv_pw': 'project', 'bn2': 'project_norm'}
NORM = {
  'weight': 'scale',
  'bias': 'bias',
  'running_mean': 'running_mean',
  'running_var': 'running_var',
}
IMAGENET = {'mean': (123.675, 116.28, 103.53), 'scale': (58.395, 57.12, 57.375), 'crop': 'center'}


def is_efficientnet(arrays: Arrays) -> bool:
  """Whether the names are those of an EfficientNet, timm's or ours."""
  return KEY in arrays or OURS in arrays


def read_efficientnet(arrays: Arrays, config: dict | None) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of the arrays and of timm's config.json.

  UserError for a name that no EfficientNet has.
  """
  if OURS in arrays:
    return {name: arrays[name] for name in arrays}, {'assumed': ()}
  names = [name for name in arrays if not name.endswith('num_batches_tracked')]
  flat = {our_name(name, arrays.source): ours(name, arrays[name]) for name in names}
  facts = IMAGENET | image_facts(config or {}, {})
  return flat, facts | {'assumed': () if config else tuple(IMAGENET)}


def our_name(name: str, source: str) -> str:
  """Of one of timm's arrays."""
  module, _, leaf = name.rpartition('.')
  place, table = '', TOP
  if match := re.match(r'blocks\.(\d+)\.(\d+)\.', name):
    place = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}/'
    module, table = module.removeprefix(match[0]), BLOCK if int(match[1]) else FIRST
  if module not in table:
    raise UserError(f'{source}: {name} is in no EfficientNet that is known here')
  layer = table[module]
  inside = NORM.get(leaf, leaf) if layer.endswith('norm') else {'weight': 'kernel'}.get(leaf, leaf)
  return f'{place}{layer}/{inside}'


def ours(name: str, array: np.ndarray) -> np.ndarray:
  """Kernels with their outputs last."""
  return (
    array.transpose(2, 3, 1, 0)
    if array.ndim == 4
    else array.T
    if name == 'classifier.weight'
    else array
  )
