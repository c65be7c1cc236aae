"""Files keep one subtree a block; we keep one tree whose arrays have the depth as leading axis. This goes both ways.

A tree is flat here: {'Transformer/encoderblock/LayerNorm_0/scale': array [depth, d], 'cls': array [1, 1, d], …}.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import empty

STACKED = 'Transformer/encoderblock/'


def stack(
  arrays: Iterable[tuple[str, int | None, np.ndarray]], *, depth: int, source: str
) -> dict[str, np.ndarray]:
  """A stream of (name in our tree, block or None, array) -> the flat tree; `depth` is the number of different blocks.

  Each array is copied to its place as it comes, so that a file is in memory once. UserError where a block lacks an array
  that another has, or the blocks differ in a shape.
  """
  flat, seen = {}, {}
  for name, block, array in arrays:
    if block is None:
      flat[name] = array
      continue
    if block >= depth:  # Before anything is allocated for so many.
      raise UserError(f'{source}: there is a block {block}, and only {depth} blocks')
    if name not in flat:
      flat[name] = empty((depth, *array.shape))
    out = flat[name]
    if out.shape[1:] != array.shape:
      raise UserError(
        f'{source}: {name} is {list(array.shape)} in block {block}, and {list(out.shape[1:])} in others'
      )
    out[block] = array
    seen.setdefault(name, set()).add(block)
  for name, blocks in seen.items():
    if missing := set(range(depth)) - blocks:
      raise UserError(
        f'{source}: block {min(missing)} of {depth} has no {name.removeprefix(STACKED)}'
      )
  return flat


def unstack(flat: dict[str, np.ndarray]) -> Iterator[tuple[str, int | None, np.ndarray]]:
  """The inverse of `stack`."""
  for name, array in flat.items():
    if name.startswith(STACKED):
      yield from ((name, block, array[block]) for block in range(array.shape[0]))
    else:
      yield name, None, array
