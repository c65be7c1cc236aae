"""What timm's and Hugging Face's files have in common: PyTorch's shapes of the layers that we have, to ours and back.

A layer is 'module.weight' and 'module.bias' there, 'module/kernel' (or scale) and 'module/bias' here. Shapes: d width, h heads,
c channels of a head, i inputs, o outputs, p q patch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.variants import VIT_VARIANTS
from vit_jax.pretrained.arrays import BLOCK_PREFIX, LazyArrays, stack_blocks, unstack_blocks

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
ATTENTION_MODULE = 'MultiHeadDotProductAttention_1'
BLOCK_NUMBER_PATTERN = re.compile(
  '0|[1-9][0-9]*'
)  # Of a block, as these libraries write it: none has two names.


@dataclasses.dataclass(frozen=True, slots=True)
class LayerConversion:
  """A kind of layer: our name of its weight, and how its weight and its bias come here and go there."""

  weight: str
  here: Callable[[np.ndarray, int], np.ndarray] = lambda w, heads: w
  there: Callable[[np.ndarray], np.ndarray] = lambda w: w
  bias_here: Callable[[np.ndarray, int], np.ndarray] = lambda b, heads: b


flatten_array = lambda x: x.reshape(-1)
LAYER_CONVERSIONS = {
  'norm': LayerConversion('scale'),
  'dense': LayerConversion('kernel', lambda w, heads: w.T, lambda w: w.T),  # [o, i] there.
  'conv': LayerConversion(
    'kernel', lambda w, heads: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)
  ),  # [o, i, p, q] there.
  'in': LayerConversion(  # [h·c, d] there, [d, h, c] here; its bias [h·c] there, [h, c] here.
    'kernel',
    lambda w, heads: w.T.reshape(w.shape[1], heads, -1),
    lambda w: w.reshape(w.shape[0], -1).T,
    lambda b, heads: b.reshape(heads, -1),
  ),
  'out': LayerConversion(
    'kernel',
    lambda w, heads: w.T.reshape(heads, -1, w.shape[0]),
    lambda w: w.reshape(-1, w.shape[-1]).T,
  ),
}
WEIGHT_RANKS = {
  'table': 3,
  'scale': 1,
  'norm': 1,
  'dense': 2,
  'conv': 4,
  'in': 2,
  'out': 2,
}  # Of a weight, or of an array by itself.
HEAD_AXES = {
  ('in', 'weight'): 0,
  ('in', 'bias'): 0,
  ('out', 'weight'): 1,
}  # The axis that is h·c there.

# Their module -> (our module, kind), for the layers outside the blocks, and for those of a block. Tables are single arrays.
LayerNames = dict[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class TorchLayout:
  """The names of one of these libraries. `block` is what stands before a layer of block {}."""

  tables: dict[str, str]
  top: LayerNames
  block: str
  layers: LayerNames
  scales: dict[
    str, str
  ]  # LayerScale: their array of a block -> the layer of ours that it is folded into.

  def read(self, arrays: LazyArrays, heads: int) -> dict[str, np.ndarray]:
    """The flat tree. UserError that lists the arrays which have no place in it."""
    found = {name: self.find(name) for name in arrays}
    if unknown := [name for name, place in found.items() if place is None]:
      more = f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''
      raise UserError(
        f'{arrays.source} holds what this Vision Transformer has no place for: {", ".join(unknown[:5])}{more}'
      )
    depth = len({block for _, block, _, _ in found.values() if block is not None})

    for name, (_, _, kind, part) in found.items():
      if wrong := describe_shape_mismatch(arrays.shape(name), kind, part, heads):
        raise UserError(f'{arrays.source}: {name} is {list(arrays.shape(name))}: {wrong}')

    def stream() -> Iterator[tuple[str, int | None, np.ndarray]]:
      for name, (ours, block, kind, part) in found.items():
        array = arrays[name]
        if kind in LAYER_CONVERSIONS:
          array = (
            LAYER_CONVERSIONS[kind].here(array, heads)
            if part == 'weight'
            else LAYER_CONVERSIONS[kind].bias_here(array, heads)
          )
        yield ours, block, array

    return fold_layer_scale(
      stack_blocks(stream(), depth=depth, source=arrays.source), self.scales, arrays.source
    )

  def find(self, name: str) -> tuple[str, int | None, str, str] | None:
    """(our name, block, kind, weight or bias) of an array of theirs; None where it has no place."""
    if name in self.tables:
      return self.tables[name], None, 'table', ''
    before, _, after = self.block.partition('{}')
    number, _, rest = name.removeprefix(before).partition(after)
    block = (
      int(number) if name.startswith(before) and BLOCK_NUMBER_PATTERN.fullmatch(number) else None
    )
    if block is not None and rest in self.scales:
      return BLOCK_PREFIX + rest, block, 'scale', ''
    module, _, part = (name if block is None else rest).rpartition('.')
    ours, kind = (self.top if block is None else self.layers).get(module, ('', ''))
    if not ours or part not in ('weight', 'bias'):
      return None
    leaf = LAYER_CONVERSIONS[kind].weight if part == 'weight' else 'bias'
    return f'{"" if block is None else BLOCK_PREFIX}{ours}/{leaf}', block, kind, part

  def write(self, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their arrays. UserError for an array of ours that they have no name for."""
    modules = {ours: (theirs, kind) for theirs, (ours, kind) in self.top.items()}
    layers = {ours: (theirs, kind) for theirs, (ours, kind) in self.layers.items()}
    tables = {ours: theirs for theirs, ours in self.tables.items()}
    out = {}
    for name, block, array in unstack_blocks(flat):
      if name in tables:
        out[tables[name]] = np.ascontiguousarray(array)
        continue
      module, _, part = name.removeprefix(BLOCK_PREFIX).rpartition('/')
      theirs, kind = (modules if block is None else layers).get(module, ('', ''))
      if not theirs:
        raise UserError(f'there is no name for {name} in that layout')
      before = '' if block is None else self.block.format(block)
      array = flatten_array(array) if part == 'bias' else LAYER_CONVERSIONS[kind].there(array)
      out[f'{before}{theirs}.{"bias" if part == "bias" else "weight"}'] = np.ascontiguousarray(
        array
      )
    return out


def describe_shape_mismatch(shape: tuple[int, ...], kind: str, part: str, heads: int) -> str:
  """What is wrong with the shape of an array of theirs; '' where it can come here."""
  axes = 1 if part == 'bias' else WEIGHT_RANKS[kind]
  if len(shape) != axes:
    return f'{axes} axes are expected'
  axis = HEAD_AXES.get((kind, part))
  return (
    f'it does not divide into {heads} heads' if axis is not None and shape[axis] % heads else ''
  )


def patch_kernel_size(arrays: LazyArrays, name: str) -> tuple[int, tuple[int, int]]:
  """(width, height and width of a patch) by the kernel of the patches. UserError where it is none."""
  shape = arrays.shape(name)
  if len(shape) != 4 or not all(shape):
    raise UserError(
      f'{arrays.source}: {name} is {list(shape)}: expected [width, channels, height, width of a patch]'
    )
  return shape[0], shape[2:]


def fold_layer_scale(
  flat: dict[str, np.ndarray], scales: dict[str, str], source: str
) -> dict[str, np.ndarray]:
  """LayerScale's vectors [depth, d] multiplied into the layers whose results they scale: the same function without them."""
  flat = dict(flat)
  for scale, layer in scales.items():
    if BLOCK_PREFIX + scale not in flat:
      continue
    gamma = flat.pop(BLOCK_PREFIX + scale)
    for name in (f'{BLOCK_PREFIX}{layer}/kernel', f'{BLOCK_PREFIX}{layer}/bias'):
      if name not in flat or flat[name].shape[-1:] != gamma.shape[1:]:
        raise UserError(
          f'{source}: {scale} is {list(gamma.shape[1:])}, and there is no {name} of as many outputs'
        )
      flat[name] = flat[name] * gamma.reshape(gamma.shape[0], *[1] * (flat[name].ndim - 2), -1)
  return flat


def normalize_position_rows(
  flat: dict[str, np.ndarray], patches: int, source: str
) -> dict[str, np.ndarray]:
  """Position embeddings with a row for the class token and none for registers, whichever rows the file has.

  A file may have none for the class token (whose own embedding then is all there is: a row of zeros), or some for the
  registers, which are added to them: they are always at the same place. What is left are rows for `patches`, or as many as
  make a square where that is not known (0). UserError where there is no table: places are then told in a way unknown here.
  """
  if POSITION_EMBEDDING not in flat:
    raise UserError(
      f'{source} has no position embeddings: rotary or relative ones are not among those here'
    )
  table, registers = flat[POSITION_EMBEDDING], flat.get('registers')
  cls, rows = int('cls' in flat), table.shape[1]
  square = lambda n: n > 0 and math.isqrt(n) ** 2 == n
  layouts = (
    cls,
    0,
    cls + (0 if registers is None else registers.shape[1]),
  )  # Rows before those of the patches.
  before = next(
    (n for n in layouts if rows - n == patches), next((n for n in layouts if square(rows - n)), cls)
  )
  if before < cls:
    return flat | {POSITION_EMBEDDING: np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)}
  if before == cls:
    return flat
  theirs = table[:, cls:before]
  if registers.shape != theirs.shape:
    raise UserError(
      f'{source}: registers are {list(registers.shape)}, and their position embeddings {list(theirs.shape)}'
    )
  kept = np.concatenate([table[:, :cls], table[:, before:]], axis=1)
  return flat | {POSITION_EMBEDDING: kept, 'registers': registers + theirs}


def patch_count(size: tuple[int, int] | None, stride: tuple[int, int]) -> int:
  """In an image of `size`, one for each `stride` (both height, width in pixels); 0 where the size is not known."""
  return (size[0] // stride[0]) * (size[1] // stride[1]) if size else 0


def infer_heads(said: int | None, width: int, depth: int, source: str) -> int:
  """As said; else what the variant of that width and depth has, else one for each 64 channels: flat kernels can't tell."""
  if said:
    if said < 1:
      raise UserError(f'{source}: {said} heads: expected a positive number')
    return said
  for row in VIT_VARIANTS.values():
    if row[:2] == (width, depth):
      return row[3]
  if width % 64:
    raise UserError(
      f'{source}: a width of {width} does not say how many heads there are: add heads=…'
    )
  return width // 64


def index_count(names: Iterable[str], before: str) -> int:
  """Different numbers that follow `before` in names."""
  return len(
    {name.removeprefix(before).partition('.')[0] for name in names if name.startswith(before)}
  )


NUMBER_TYPES = (int, float)
TYPE_DESCRIPTIONS = {
  int: 'a whole number', NUMBER_TYPES: 'a number', str: 'a text', bool: 'true or false', list: 'a list', dict: 'an object',
}  # fmt: skip


def read_field(config: dict, name: str, kind: type | tuple[type, ...], file: str = 'config.json'):
  """What a JSON object says by `name`; None where it does not, or says null. UserError where that is of another kind."""
  value = config.get(name)
  if value is not None and (
    not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)
  ):
    raise UserError(f'{file}: {name} is {value!r}: expected {TYPE_DESCRIPTIONS[kind]}')
  return value


def read_pixel_statistics(
  config: dict, name: str, file: str = 'config.json'
) -> tuple[float, float, float] | None:
  """Means or deviations of a pixel in [0, 1] -> of a uint8 channel, as a person would write them; None where there are none."""
  values = read_field(config, name, list, file)
  if values is None:
    return None
  if len(values) != 3 or not all(isinstance(value, NUMBER_TYPES) for value in values):
    raise UserError(f'{file}: {name} is {values}: expected three numbers')
  return tuple(round(255 * value, 6) for value in values)


def read_image_size(value, name: str, file: str = 'config.json') -> tuple[int, int] | None:
  """(height, width) in pixels, of one number, a list or an object of the two; None for null."""
  if value is None:
    return None
  sides = [value.get('height'), value.get('width')] if isinstance(value, dict) else value
  sides = [sides, sides] if isinstance(sides, int) else sides
  if (
    not isinstance(sides, list)
    or len(sides) != 2
    or not all(isinstance(side, int) and side > 0 for side in sides)
  ):
    raise UserError(f'{file}: {name} is {value!r}: expected a height and a width in pixels')
  return tuple(sides)
