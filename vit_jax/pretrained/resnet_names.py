"""BiT's names: the published BiT-S and BiT-M .npz, and ResNets in our own names, to our tree and back.

The published files are V2. `resnet/block1/unit01/a/standardized_conv2d/kernel` of theirs is our `block1/unit1/conv1/kernel`;
some number their convolutions, `standardized_conv2d_17`, and their heads are 1x1 convolutions.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import Arrays

ROOT = 'resnet/root_block/standardized_conv2d/kernel'
OURS = 'conv_root/kernel'
NUMBERED = re.compile(r'/standardized_conv2d_\d+/')
UNIT = re.compile(
  r'resnet/block(\d+)/unit(\d+)/([abc])/(proj/)?(standardized_conv2d/kernel|group_norm/(?:gamma|beta))'
)
LAYERS = {'a': '1', 'b': '2', 'c': '3'}
NORMS = {'gamma': 'scale', 'beta': 'bias'}
TOP = {
  ROOT: OURS,
  'resnet/group_norm/gamma': 'norm-pre-head/scale',
  'resnet/group_norm/beta': 'norm-pre-head/bias',
  'resnet/head/conv2d/kernel': 'head/kernel',
  'resnet/head/conv2d/bias': 'head/bias',
}
FACTS = {'mean': (127.5,) * 3, 'scale': (127.5,) * 3, 'crop': 'resize'}


def is_resnet(arrays: Arrays) -> bool:
  """Whether a file holds a ResNet and no hybrid, in either's names."""
  return OURS in arrays or any(plain(name) == ROOT for name in arrays)


def read_resnet(arrays: Arrays) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides). UserError where two names mean the same array."""
  flat = {}
  for name in arrays:
    ours = name if OURS in arrays else our_name(name)
    if ours in flat:
      raise UserError(f'{arrays.source} holds {ours} under two names')
    array = arrays[name]
    flat[ours] = array[0, 0] if ours == 'head/kernel' and array.ndim == 4 else array
  return flat, FACTS | {'assumed': tuple(FACTS)}


def plain(name: str) -> str:
  """A name without the number of its convolution."""
  return NUMBERED.sub('/standardized_conv2d/', name)


def our_name(name: str) -> str:
  """Of an array of a published file; its own where it is none of BiT's."""
  name = plain(name)
  if not (match := UNIT.fullmatch(name)):
    return TOP.get(name, name)
  block, unit, layer, projects, what = match.groups()
  kind, _, leaf = what.partition('/')
  norm = kind == 'group_norm'
  inside = f'gn{LAYERS[layer]}' if norm else 'conv_proj' if projects else f'conv{LAYERS[layer]}'
  return f'block{block}/unit{int(unit)}/{inside}/{NORMS[leaf] if norm else leaf}'


def to_bit(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a published .npz, which BiT's code, big_vision and timm read. V1, which none is, keeps our names."""
  if 'norm-pre-head/scale' not in flat:
    return flat
  theirs = {ours: name for name, ours in TOP.items()}
  letters = {number: letter for letter, number in LAYERS.items()}
  leaves = {ours: name for name, ours in NORMS.items()}
  out = {}
  for name, array in flat.items():
    if name not in theirs:
      block, unit, layer, leaf = name.split('/')
      place = 'a/proj' if layer == 'conv_proj' else letters[layer[-1]]
      what = f'group_norm/{leaves[leaf]}' if leaf in leaves else f'standardized_conv2d/{leaf}'
      out[f'resnet/{block}/unit{int(unit.removeprefix("unit")):02}/{place}/{what}'] = array
    else:
      out[theirs[name]] = array[None, None] if name == 'head/kernel' else array
  return out
