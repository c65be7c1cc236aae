"""Convert between PyTorch's layouts of a Vision Transformer and our parameter tree.

timm and Hugging Face share this code. They name a layer 'module.weight' and 'module.bias'. We name
it 'module/kernel' (or scale) and 'module/bias'.

Shapes: d width, h heads, c channels of a head, i inputs, o outputs, p q patch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.variants import VIT_VARIANTS
from vit_jax.pretrained.arrays import (
  BLOCK_PREFIX,
  POSITION_EMBEDDING,
  RELATIVE_TABLE,
  LazyArrays,
  stack_blocks,
  summarize_list,
  unstack_blocks,
)

# A block index as these libraries write it. Leading zeros are excluded, so that no block has two
# names.
BLOCK_NUMBER_PATTERN = re.compile('0|[1-9][0-9]*')


@dataclasses.dataclass(frozen=True, slots=True)
class LayerConversion:
  """Our name of one kind of layer's weight, and the conversions of its weight and bias."""

  weight_name: str
  from_torch: Callable[[np.ndarray, int], np.ndarray] = lambda w, heads: w
  to_torch: Callable[[np.ndarray], np.ndarray] = lambda w: w
  bias_from_torch: Callable[[np.ndarray, int], np.ndarray] = lambda b, heads: b


LAYER_CONVERSIONS = {
  'norm': LayerConversion('scale'),
  # PyTorch [o, i], ours [i, o].
  'dense': LayerConversion('kernel', lambda w, heads: w.T, lambda w: w.T),
  # PyTorch [o, i, p, q], ours [p, q, i, o].
  'conv': LayerConversion(
    'kernel', lambda w, heads: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)
  ),
  # Query, key or value: PyTorch [h·c, d], ours [d, h, c]. Bias: PyTorch [h·c], ours [h, c].
  'in': LayerConversion(
    'kernel',
    lambda w, heads: w.T.reshape(w.shape[1], heads, -1),
    lambda w: w.reshape(w.shape[0], -1).T,
    lambda b, heads: b.reshape(heads, -1),
  ),
  # Output projection of attention: PyTorch [d, h·c], ours [h, c, d].
  'out': LayerConversion(
    'kernel',
    lambda w, heads: w.T.reshape(heads, -1, w.shape[0]),
    lambda w: w.reshape(-1, w.shape[-1]).T,
  ),
}
# Number of axes of a weight, or of an array outside any layer (table, scale, offsets).
WEIGHT_RANKS = {
  'table': 3,
  'scale': 1,
  'offsets': 2,
  'norm': 1,
  'dense': 2,
  'conv': 4,
  'in': 2,
  'out': 2,
}
# The axis of a PyTorch array that is h·c.
HEAD_AXES = {('in', 'weight'): 0, ('in', 'bias'): 0, ('out', 'weight'): 1}

# Width and depth of published models with a gated MLP whose heads are not 64 wide: DINOv3 7B.
SWIGLU_HEADS = {(4096, 40): 32}

LayerNames = dict[str, tuple[str, str]]  # PyTorch's module -> (our module, kind of layer).


@dataclasses.dataclass(frozen=True, slots=True)
class TorchLayout:
  """Names of the arrays in one library.

  Attributes:
    single_arrays: arrays outside any layer, such as the class token -> our names.
    top_layers: layers outside the blocks.
    block_prefix: prefix of the layers of a block, with {} for its index.
    block_layers: layers of a block, without the prefix.
    block_arrays: arrays of a block that belong to no layer -> our names.
  """

  single_arrays: dict[str, str]
  top_layers: LayerNames
  block_prefix: str
  block_layers: LayerNames
  block_arrays: dict[str, str]

  def from_torch_arrays(self, arrays: LazyArrays, heads: int) -> dict[str, np.ndarray]:
    """Convert the arrays of a file to a flat tree.

    Raises UserError for arrays that the layout does not name, or that have the wrong shape.
    """
    locations = {name: self.locate_array(name) for name in arrays}
    if unknown := [name for name, location in locations.items() if location is None]:
      names = summarize_list(unknown, separator=', ')
      raise UserError(f'{arrays.source} contains arrays of an unsupported model: {names}')
    for name, (_, _, kind, part) in locations.items():
      if problem := describe_shape_mismatch(arrays.shape_of(name), kind, part, heads):
        raise UserError(f'{arrays.source}: {name} is {list(arrays.shape_of(name))}: {problem}')

    def convert() -> Iterator[tuple[str, int | None, np.ndarray]]:
      for name, (our_name, block, kind, part) in locations.items():
        array = arrays[name]
        if kind in LAYER_CONVERSIONS:
          conversion = LAYER_CONVERSIONS[kind]
          function = conversion.from_torch if part == 'weight' else conversion.bias_from_torch
          array = function(array, heads)
        yield our_name, block, array

    depth = len({block for _, block, _, _ in locations.values() if block is not None})
    return stack_blocks(convert(), depth=depth, source=arrays.source)

  def locate_array(self, name: str) -> tuple[str, int | None, str, str] | None:
    """Return (our name, block index or None, kind, 'weight' or 'bias') of an array.

    Returns None if the layout does not name it.
    """
    if name in self.single_arrays:
      return self.single_arrays[name], None, 'table', ''
    before, _, after = self.block_prefix.partition('{}')
    number, _, rest = name.removeprefix(before).partition(after)
    in_block = name.startswith(before) and BLOCK_NUMBER_PATTERN.fullmatch(number)
    block = int(number) if in_block else None
    if in_block and rest in self.block_arrays:
      our_name = BLOCK_PREFIX + self.block_arrays[rest]
      return our_name, block, 'offsets' if our_name == RELATIVE_TABLE else 'scale', ''
    module, _, part = (rest if in_block else name).rpartition('.')
    layers = self.block_layers if in_block else self.top_layers
    if module not in layers or part not in ('weight', 'bias'):
      return None
    our_module, kind = layers[module]
    leaf = LAYER_CONVERSIONS[kind].weight_name if part == 'weight' else 'bias'
    return f'{BLOCK_PREFIX if in_block else ""}{our_module}/{leaf}', block, kind, part

  def to_torch_arrays(self, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert a flat tree to the arrays of a file.

    Raises UserError for an array that the layout does not name.
    """
    top_layers = {ours: (name, kind) for name, (ours, kind) in self.top_layers.items()}
    block_layers = {ours: (name, kind) for name, (ours, kind) in self.block_layers.items()}
    single_arrays = {ours: name for name, ours in self.single_arrays.items()}
    block_arrays = {BLOCK_PREFIX + ours: name for name, ours in self.block_arrays.items()}
    out = {}
    for name, block, array in unstack_blocks(flat):
      if name in block_arrays:
        out[self.block_prefix.format(block) + block_arrays[name]] = np.ascontiguousarray(array)
        continue
      if name in single_arrays:
        out[single_arrays[name]] = np.ascontiguousarray(array)
        continue
      our_module, _, leaf = name.removeprefix(BLOCK_PREFIX).rpartition('/')
      layers = top_layers if block is None else block_layers
      if our_module not in layers:
        raise UserError(f'the format has no name for {name}')
      module, kind = layers[our_module]
      prefix = '' if block is None else self.block_prefix.format(block)
      is_bias = leaf == 'bias'
      array = array.reshape(-1) if is_bias else LAYER_CONVERSIONS[kind].to_torch(array)
      part = 'bias' if is_bias else 'weight'
      out[f'{prefix}{module}.{part}'] = np.ascontiguousarray(array)
    return out


def describe_shape_mismatch(shape: tuple[int, ...], kind: str, part: str, heads: int) -> str:
  """Describe what is wrong with the shape of a PyTorch array, or return '' if nothing is."""
  axes = 1 if part == 'bias' else WEIGHT_RANKS[kind]
  if len(shape) != axes:
    return f'expected {axes} axes'
  axis = HEAD_AXES.get((kind, part))
  indivisible = axis is not None and shape[axis] % heads
  return f'not divisible into {heads} heads' if indivisible else ''


def patch_kernel_size(arrays: LazyArrays, name: str) -> tuple[int, tuple[int, int]]:
  """Return the width of the model and the patch size (height, width) from the patch kernel's shape.

  Raises UserError if it is not [d, channels, p, q].
  """
  shape = arrays.shape_of(name)
  if len(shape) != 4 or not all(shape):
    raise UserError(
      f'{arrays.source}: {name} is {list(shape)}: '
      'expected [width, channels, patch height, patch width]'
    )
  return shape[0], shape[2:]


def normalize_position_rows(
  flat: dict[str, np.ndarray], patches: int, source: str
) -> dict[str, np.ndarray]:
  """Give the position embeddings a row for the class token, and none for registers.

  A distillation token has a row too. A file without such rows gets rows of zeros, because the
  tokens' own embeddings are complete. Rows for registers are added to the registers, because their
  position never changes. A tree with relative positions is returned unchanged.

  `patches` is the number of patches, or 0 if unknown. Then the rows of patches must form a square.

  Raises UserError if there are no position embeddings, as in models with rotary ones.
  """
  if RELATIVE_TABLE in flat:
    return flat
  if POSITION_EMBEDDING not in flat:
    raise UserError(
      f'{source} has no position embeddings. Rotary ones are supported only of a model '
      'that a config.json beside the file names, such as DINOv3 or EVA-02'
    )
  table, registers = flat[POSITION_EMBEDDING], flat.get('registers')
  cls, rows = ('cls' in flat) + ('dist' in flat), table.shape[1]
  # The possible numbers of rows before those of the patches.
  candidates = (cls, 0, cls + (0 if registers is None else registers.shape[1]))
  exact = [n for n in candidates if rows - n == patches]
  square = [n for n in candidates if rows > n and math.isqrt(rows - n) ** 2 == rows - n]
  extra = [*exact, *square, cls][0]
  if extra < cls:
    zeros = np.zeros((1, cls - extra, table.shape[-1]), table.dtype)
    return flat | {POSITION_EMBEDDING: np.concatenate([zeros, table], axis=1)}
  if extra == cls:
    return flat
  register_rows = table[:, cls:extra]
  if registers.shape != register_rows.shape:
    raise UserError(
      f'{source}: registers are {list(registers.shape)}, '
      f'and their position embeddings {list(register_rows.shape)}'
    )
  table = np.concatenate([table[:, :cls], table[:, extra:]], axis=1)
  return flat | {POSITION_EMBEDDING: table, 'registers': registers + register_rows}


def patch_count(size: tuple[int, int] | None, stride: tuple[int, int]) -> int:
  """Return the number of patches in an image, or 0 if `size` is None.

  `size` and `stride` are (height, width) in pixels.
  """
  return (size[0] // stride[0]) * (size[1] // stride[1]) if size else 0


def infer_heads(
  heads: int | None, width: int, depth: int, source: str, *, swiglu: bool = False
) -> int:
  """Return the number of heads, which flat attention kernels do not determine.

  It is `heads` if given, else that of the variant with this width and depth, else width / 64. For
  models with `swiglu`, the variants are those in SWIGLU_HEADS.

  Raises UserError if `heads` is negative, or if the width is not divisible by 64.
  """
  if heads:
    if heads < 1:
      raise UserError(f'{source}: {heads} heads: expected a positive number')
    return heads
  known = SWIGLU_HEADS if swiglu else {row[:2]: row[3] for row in reversed(VIT_VARIANTS.values())}
  if (width, depth) in known:
    return known[width, depth]
  if width % 64:
    raise UserError(f'{source}: a width of {width} does not determine the heads: add heads=…')
  return width // 64


def index_count(names: Iterable[str], prefix: str) -> int:
  """Return the number of distinct indices that follow `prefix` in the names."""
  return len(
    {name.removeprefix(prefix).partition('.')[0] for name in names if name.startswith(prefix)}
  )
