"""Convert Google's .npz layouts to our parameter tree and back.

Layouts: the Vision Transformers released in 2020 and later, big_vision's, and BiT's ResNets. Our
names are those of 2020. These differences remain: a prefix of the model in the file, newer names of
the same layers, blocks stored one by one or stacked, and position embeddings with or without a row
for the class token.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import (
  ATTENTION_MODULE,
  BLOCK_PREFIX,
  PATCH_KERNEL,
  POSITION_EMBEDDING,
  PRE_HEAD_NORM_SCALE,
  RESNET_ROOT_KERNEL,
  LazyArrays,
  stack_blocks,
  unstack_blocks,
)
from vit_jax.pretrained.preprocessing import BIG_VISION_STEPS, GOOGLE_STEPS, HALF_STATISTICS

# Where the model is in a file: at the top, in an optimizer state (SAM), in big_vision's tree, or in
# the image tower of big_vision's two-tower tree.
GOOGLE_PREFIXES = ('', 'opt/target/', 'params/', 'params/img/', 'target/', 'img/')
GOOGLE_BLOCK_PATTERN = re.compile(r'Transformer/encoderblock(?:_(\d+))?/(.*)')
# Newer Linen counts layers of each kind. The files of 2020 count all layers of a block together.
LINEN_TO_2020_NAMES = {
  'LayerNorm_1': 'LayerNorm_2',
  'MultiHeadDotProductAttention_0': ATTENTION_MODULE,
  'MlpBlock_0': 'MlpBlock_3',
}
# Group norms are stored as [1, 1, 1, c].
GROUP_NORM_PATTERN = re.compile(r'(.*/)?gn(\d|_root|_proj)/(scale|bias)')

# Our arrays that Google's layout has no name for.
UNNAMED_IN_GOOGLE = re.compile(
  r'dist|registers|embedding/norm_.*|Transformer/pre_norm/.*|fc_norm/.*|.*/Gate/.*'
  r'|.*/(query|key|hidden)_norm/.*'
)

BIT_DEFAULTS = HALF_STATISTICS | GOOGLE_STEPS
GOOGLE_DEFAULTS = {'gelu': 'tanh', 'norm_eps': 1e-6} | BIT_DEFAULTS

BIT_ROOT_KERNEL = 'resnet/root_block/standardized_conv2d/kernel'
NUMBERED_CONV_PATTERN = re.compile(r'/standardized_conv2d_\d+/')
BIT_UNIT_PATTERN = re.compile(
  r'resnet/block(\d+)/unit(\d+)/([abc])/(proj/)?'
  r'(standardized_conv2d/kernel|group_norm/(?:gamma|beta))'
)
BIT_LAYER_NUMBERS = {'a': '1', 'b': '2', 'c': '3'}
BIT_NORM_NAMES = {'gamma': 'scale', 'beta': 'bias'}
BIT_TOP_NAMES = {
  BIT_ROOT_KERNEL: RESNET_ROOT_KERNEL,
  'resnet/group_norm/gamma': PRE_HEAD_NORM_SCALE,
  'resnet/group_norm/beta': 'norm-pre-head/bias',
  'resnet/head/conv2d/kernel': 'head/kernel',
  'resnet/head/conv2d/bias': 'head/bias',
}


def find_google_prefix(arrays: LazyArrays) -> str | None:
  """Return the prefix of the Vision Transformer in the file, or None for another layout."""
  return next((prefix for prefix in GOOGLE_PREFIXES if prefix + PATCH_KERNEL in arrays), None)


def read_google(arrays: LazyArrays) -> tuple[dict[str, np.ndarray], dict]:
  """Read a Vision Transformer, and return its flat tree and the facts that its layout implies.

  Raises UserError if blocks are incomplete.
  """
  prefix = find_google_prefix(arrays)
  model = arrays.with_prefix(prefix)
  matches = {name: GOOGLE_BLOCK_PATTERN.fullmatch(name) for name in model}
  depth = len({int(match[1]) for match in matches.values() if match and match[1]})

  def convert_names() -> Iterator[tuple[str, int | None, np.ndarray]]:
    for name, match in matches.items():
      if not match:
        yield from_google_top_name(name), None, squeeze_group_norm(name, model[name])
        continue
      layer, slash, rest = match[2].partition('/')
      our_name = BLOCK_PREFIX + LINEN_TO_2020_NAMES.get(layer, layer) + slash + rest
      yield our_name, int(match[1]) if match[1] else None, model[name]

  stream = check_unique_names(convert_names(), arrays.source)
  flat = stack_blocks(stream, depth=depth, source=arrays.source)
  if 'pos_embedding' in model and 'cls' in flat:  # big_vision has no row for the class token.
    table = flat[POSITION_EMBEDDING]
    flat[POSITION_EMBEDDING] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  ignored = len(arrays) - len(model)
  notes = (f'{ignored} arrays outside {prefix} are ignored',) if ignored else ()
  facts = GOOGLE_DEFAULTS | (BIG_VISION_STEPS if is_big_vision(prefix, matches) else {})
  return flat, facts | {'assumed': tuple(facts), 'notes': notes}


def is_big_vision(prefix: str, names: Iterable[str]) -> bool:
  """Return whether the file of these names below `prefix` is a classifier of big_vision.

  Its blocks have the names of newer Linen. The image towers of its two-tower models are evaluated
  as Google's other files are, on the resized image.
  """
  is_tower = prefix.endswith('img/')
  return not is_tower and any(
    name.startswith('Transformer/encoderblock') and '/MultiHeadDotProductAttention_0/' in name
    for name in names
  )


def from_google_top_name(name: str) -> str:
  """Return our name of an array outside the blocks."""
  return POSITION_EMBEDDING if name == 'pos_embedding' else name


def squeeze_group_norm(name: str, array: np.ndarray) -> np.ndarray:
  """Reshape a group norm's [1, 1, 1, c] to [c], and return any other array unchanged."""
  is_row = array.shape[:-1] == (1,) * (array.ndim - 1)
  return array.reshape(-1) if GROUP_NORM_PATTERN.fullmatch(name) and is_row else array


def check_unique_names(
  stream: Iterable[tuple[str, int | None, np.ndarray]], source: str
) -> Iterator[tuple[str, int | None, np.ndarray]]:
  """Yield the items of `stream`. Raises UserError if two names in a file mean the same array."""
  seen = set()
  for name, block, array in stream:
    if (name, block) in seen:
      raise UserError(f'{source} contains {name} under an older and a newer name')
    seen.add((name, block))
    yield name, block, array


def to_google(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the arrays of a 2020 .npz file, which the original code and timm read.

  Raises UserError if the layout has no name for an array.
  """
  for name in flat:
    if UNNAMED_IN_GOOGLE.fullmatch(name):
      raise UserError(f"Google's layout has no name for {name}: export with --format timm")
  out = {}
  for name, block, array in unstack_blocks(flat):
    if block is not None:
      name = f'Transformer/encoderblock_{block}/{name.removeprefix(BLOCK_PREFIX)}'
    out[name] = array.reshape(1, 1, 1, -1) if GROUP_NORM_PATTERN.fullmatch(name) else array
  return out


def is_resnet(arrays: LazyArrays) -> bool:
  """Return whether a file contains a ResNet, not a hybrid, in BiT's names or ours."""
  is_bit = any(strip_conv_number(name) == BIT_ROOT_KERNEL for name in arrays)
  return is_bit or RESNET_ROOT_KERNEL in arrays


def read_resnet(arrays: LazyArrays) -> tuple[dict[str, np.ndarray], dict]:
  """Read a ResNet, and return its flat tree and the facts that its layout implies.

  Raises UserError if two names mean the same array.
  """
  flat = {}
  for name in arrays:
    our_name = name if RESNET_ROOT_KERNEL in arrays else from_bit_name(name)
    if our_name in flat:
      raise UserError(f'{arrays.source} contains {our_name} under two names')
    array = arrays[name]
    flat[our_name] = array[0, 0] if our_name == 'head/kernel' and array.ndim == 4 else array
  return flat, BIT_DEFAULTS | {'assumed': tuple(BIT_DEFAULTS)}


def strip_conv_number(name: str) -> str:
  """Remove the number that some files add to the names of convolutions."""
  return NUMBERED_CONV_PATTERN.sub('/standardized_conv2d/', name)


def from_bit_name(name: str) -> str:
  """Return our name of an array of a BiT file, or the name itself if it is not one of BiT's."""
  name = strip_conv_number(name)
  if not (match := BIT_UNIT_PATTERN.fullmatch(name)):
    return BIT_TOP_NAMES.get(name, name)
  block, unit, layer, is_projection, suffix = match.groups()
  kind, _, leaf = suffix.partition('/')
  unit_name = f'block{block}/unit{int(unit)}'
  if kind == 'group_norm':
    return f'{unit_name}/gn{BIT_LAYER_NUMBERS[layer]}/{BIT_NORM_NAMES[leaf]}'
  conv = 'conv_proj' if is_projection else f'conv{BIT_LAYER_NUMBERS[layer]}'
  return f'{unit_name}/{conv}/{leaf}'


def to_bit(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the arrays of a BiT .npz file, which BiT's code, big_vision and timm read.

  BiT released only ResNet-v2. A ResNet-v1 is returned in our own names.
  """
  if PRE_HEAD_NORM_SCALE not in flat:
    return flat
  bit_top_names = {ours: name for name, ours in BIT_TOP_NAMES.items()}
  bit_layers = {number: letter for letter, number in BIT_LAYER_NUMBERS.items()}
  bit_norm_names = {ours: name for name, ours in BIT_NORM_NAMES.items()}
  out = {}
  for name, array in flat.items():
    if name in bit_top_names:
      out[bit_top_names[name]] = array[None, None] if name == 'head/kernel' else array
      continue
    block, unit, layer, leaf = name.split('/')
    module = 'a/proj' if layer == 'conv_proj' else bit_layers[layer[-1]]
    is_norm = leaf in bit_norm_names
    suffix = f'group_norm/{bit_norm_names[leaf]}' if is_norm else f'standardized_conv2d/{leaf}'
    out[f'resnet/{block}/unit{int(unit.removeprefix("unit")):02}/{module}/{suffix}'] = array
  return out
