"""Google's names: the released .npz of 2020 and after, and big_vision's, to our tree and back.

Our names are theirs of 2020, so what is left is: where in the file the model is, newer names of the same layers, blocks kept
one by one or stacked, and position embeddings with or without a class token's row.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import BLOCK_PREFIX, LazyArrays, stack_blocks, unstack_blocks

PATCH_KERNEL = 'embedding/kernel'
# Where the model is in a file: at its top, in a whole optimizer state (SAM), in big_vision's tree, its two-tower tree's images.
GOOGLE_PREFIXES = ('', 'opt/target/', 'params/', 'params/img/', 'target/', 'img/')
GOOGLE_BLOCK_PATTERN = re.compile(r'Transformer/encoderblock(?:_(\d+))?/(.*)')
# Linen counts layers of a kind, the files of 2020 all layers together.
LINEN_TO_2020_NAMES = {
  'LayerNorm_1': 'LayerNorm_2',
  'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
  'MlpBlock_0': 'MlpBlock_3',
}
GROUP_NORM_PATTERN = re.compile(r'(.*/)?gn(\d|_root|_proj)/(scale|bias)')  # Stored as [1, 1, 1, c].
POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'

GOOGLE_DEFAULTS = {
  'gelu': 'tanh',
  'norm_eps': 1e-6,
  'mean': (127.5,) * 3,
  'scale': (127.5,) * 3,
  'crop': 'resize',
}


def find_google_prefix(arrays: LazyArrays) -> str | None:
  """The prefix of the model in the file, or None where there is none in this layout."""
  return next((prefix for prefix in GOOGLE_PREFIXES if prefix + PATCH_KERNEL in arrays), None)


def read_google(arrays: LazyArrays) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides). UserError where blocks are not whole."""
  prefix = find_google_prefix(arrays)
  inside = arrays.within(prefix)
  parts = {name: GOOGLE_BLOCK_PATTERN.fullmatch(name) for name in inside}
  blocks = {int(part[1]) for part in parts.values() if part and part[1]}

  def stream():
    for name, part in parts.items():
      if not part:
        yield from_google_top_name(name), None, squeeze_group_norm(name, inside[name])
        continue
      first, slash, rest = part[2].partition('/')
      yield (
        BLOCK_PREFIX + LINEN_TO_2020_NAMES.get(first, first) + slash + rest,
        int(part[1]) if part[1] else None,
        inside[name],
      )

  flat = stack_blocks(
    check_unique_names(stream(), arrays.source), depth=len(blocks), source=arrays.source
  )
  if 'pos_embedding' in inside and 'cls' in flat:  # big_vision has no row for the class token.
    table = flat[POSITION_EMBEDDING]
    flat[POSITION_EMBEDDING] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  beside = len(arrays) - len(inside)
  notes = (f'{beside} arrays beside those in {prefix} are left unread',) if beside else ()
  return flat, GOOGLE_DEFAULTS | {'assumed': tuple(GOOGLE_DEFAULTS), 'notes': notes}


def from_google_top_name(name: str) -> str:
  """Our name of an array outside the blocks."""
  return POSITION_EMBEDDING if name == 'pos_embedding' else name


def squeeze_group_norm(name: str, array: np.ndarray) -> np.ndarray:
  """A group norm's [1, 1, 1, c] as [c]."""
  return (
    array.reshape(-1)
    if GROUP_NORM_PATTERN.fullmatch(name) and array.shape[:-1] == (1,) * (array.ndim - 1)
    else array
  )


def check_unique_names(stream, source: str):
  """The stream. UserError where two names of a file mean the same array."""
  seen = set()
  for name, block, array in stream:
    if (name, block) in seen:
      raise UserError(f'{source} holds {name} under an older and a newer name')
    seen.add((name, block))
    yield name, block, array


def to_google(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of an .npz of 2020, which the original code and timm read. UserError for what that layout has no name for."""
  for name in flat:
    if name == 'registers' or name.startswith('embedding/norm_'):
      raise UserError(
        f"Google's layout has no place for {name}: export to safetensors with timm's names"
      )
  out = {}
  for name, block, array in unstack_blocks(flat):
    if block is not None:
      name = f'Transformer/encoderblock_{block}/{name.removeprefix(BLOCK_PREFIX)}'
    out[name] = array.reshape(1, 1, 1, -1) if GROUP_NORM_PATTERN.fullmatch(name) else array
  return out


BIT_ROOT_KERNEL = 'resnet/root_block/standardized_conv2d/kernel'


RESNET_ROOT_KERNEL = 'conv_root/kernel'


NUMBERED_CONV_PATTERN = re.compile(r'/standardized_conv2d_\d+/')


BIT_UNIT_PATTERN = re.compile(
  r'resnet/block(\d+)/unit(\d+)/([abc])/(proj/)?(standardized_conv2d/kernel|group_norm/(?:gamma|beta))'
)


BIT_LAYER_NUMBERS = {'a': '1', 'b': '2', 'c': '3'}


BIT_NORM_NAMES = {'gamma': 'scale', 'beta': 'bias'}


BIT_TOP_NAMES = {
  BIT_ROOT_KERNEL: RESNET_ROOT_KERNEL,
  'resnet/group_norm/gamma': 'norm-pre-head/scale',
  'resnet/group_norm/beta': 'norm-pre-head/bias',
  'resnet/head/conv2d/kernel': 'head/kernel',
  'resnet/head/conv2d/bias': 'head/bias',
}


BIT_DEFAULTS = {'mean': (127.5,) * 3, 'scale': (127.5,) * 3, 'crop': 'resize'}


def is_resnet(arrays: LazyArrays) -> bool:
  """Whether a file holds a ResNet and no hybrid, in either's names."""
  return RESNET_ROOT_KERNEL in arrays or any(
    strip_conv_number(name) == BIT_ROOT_KERNEL for name in arrays
  )


def read_resnet(arrays: LazyArrays) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides). UserError where two names mean the same array."""
  flat = {}
  for name in arrays:
    ours = name if RESNET_ROOT_KERNEL in arrays else from_bit_name(name)
    if ours in flat:
      raise UserError(f'{arrays.source} holds {ours} under two names')
    array = arrays[name]
    flat[ours] = array[0, 0] if ours == 'head/kernel' and array.ndim == 4 else array
  return flat, BIT_DEFAULTS | {'assumed': tuple(BIT_DEFAULTS)}


def strip_conv_number(name: str) -> str:
  """A name without the number of its convolution."""
  return NUMBERED_CONV_PATTERN.sub('/standardized_conv2d/', name)


def from_bit_name(name: str) -> str:
  """Of an array of a published file; its own where it is none of BiT's."""
  name = strip_conv_number(name)
  if not (match := BIT_UNIT_PATTERN.fullmatch(name)):
    return BIT_TOP_NAMES.get(name, name)
  block, unit, layer, projects, what = match.groups()
  kind, _, leaf = what.partition('/')
  norm = kind == 'group_norm'
  inside = (
    f'gn{BIT_LAYER_NUMBERS[layer]}'
    if norm
    else 'conv_proj'
    if projects
    else f'conv{BIT_LAYER_NUMBERS[layer]}'
  )
  return f'block{block}/unit{int(unit)}/{inside}/{BIT_NORM_NAMES[leaf] if norm else leaf}'


def to_bit(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a published .npz, which BiT's code, big_vision and timm read. V1, which none is, keeps our names."""
  if 'norm-pre-head/scale' not in flat:
    return flat
  theirs = {ours: name for name, ours in BIT_TOP_NAMES.items()}
  letters = {number: letter for letter, number in BIT_LAYER_NUMBERS.items()}
  leaves = {ours: name for name, ours in BIT_NORM_NAMES.items()}
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
