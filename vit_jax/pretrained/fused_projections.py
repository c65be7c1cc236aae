"""Split linear layers that a file stores as one, and fuse them again.

PyTorch's weight of a fused layer [o1 + o2 + …, i] is the weights of its parts, one after another.
"""

from collections.abc import Mapping

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import ArrayHeader

FusedLayers = Mapping[str, tuple[str, ...]]  # Name of a fused layer -> names of its parts.


def split_fused_projections(
  headers: dict[str, ArrayHeader], fused_layers: FusedLayers, source: str
) -> dict[str, ArrayHeader]:
  """Replace each fused layer by its parts, which have equal sizes.

  Raises UserError if its size is not divisible, or if a part also exists as a separate array.
  """
  out = {}
  for name, header in headers.items():
    module, _, leaf = name.rpartition('.')
    fused = next((f for f in fused_layers if f'.{module}'.endswith(f'.{f}')), None)
    if fused is None:
      out[name] = header
      continue
    parts = fused_layers[fused]
    if not header.shape or header.shape[0] % len(parts):
      raise UserError(
        f'{source}: {name} is {list(header.shape)}, not divisible into {len(parts)} projections'
      )
    for i, part in enumerate(parts):
      part_name = f'{module.removesuffix(fused)}{part}.{leaf}'
      if part_name in headers:
        raise UserError(f'{source} contains {part_name}, which is also part of {name}')
      out[part_name] = slice_header(header, i, len(parts))
  return out


def slice_header(header: ArrayHeader, i: int, parts: int) -> ArrayHeader:
  """Return the header of the `i`-th of equal parts along the first axis."""
  rows = header.shape[0] // parts

  def read() -> np.ndarray:
    return header.read()[i * rows : (i + 1) * rows]

  return ArrayHeader((rows, *header.shape[1:]), header.dtype, read)


def reshape_header(header: ArrayHeader, shape: tuple[int, ...]) -> ArrayHeader:
  """Return the header of an array with another shape of the same size."""
  return ArrayHeader(shape, header.dtype, lambda: header.read().reshape(shape))


def fuse_projections(
  arrays: dict[str, np.ndarray], fused_layers: FusedLayers
) -> dict[str, np.ndarray]:
  """Concatenate the parts of fused layers: the inverse of `split_fused_projections`."""
  out = dict(arrays)
  for name in arrays:
    for fused, parts in fused_layers.items():
      prefix, matched, leaf = name.partition(parts[0] + '.')
      if matched and (not prefix or prefix.endswith('.')):
        pieces = [out.pop(f'{prefix}{part}.{leaf}') for part in parts]
        out[f'{prefix}{fused}.{leaf}'] = np.concatenate(pieces)
  return out
