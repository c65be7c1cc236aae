"""Fits loaded parameters to another task, resolution and patch: a new head, resampled embeddings, all else as it was."""

import dataclasses
import math

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.resample import pi_resize, resample_grid

POSITION = 'Transformer/posembed_input/pos_embedding'
PATCH = 'embedding/kernel'
HEAD = ('head/', 'pre_logits/')
MASKING = ('mask', 'patch_head/')  # What masked patch prediction has besides, and begins anew.
RGB = 3  # Channels of a patch of pixels. One of a hybrid's stem has more, and no size that could be resized.


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
  """What became of one array: kept, new, resampled, 'PI-resized' or dropped. A shape is None where there was or is none."""

  name: str
  what: str
  old: tuple[int, ...] | None
  new: tuple[int, ...] | None


def adapt(
  loaded: dict,
  params: dict,
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
  method: str = 'corner',
  keep_head: bool = False,
) -> tuple[dict, list[Change]]:
  """(`loaded` in the shapes of `params`, what became of every array).

  The head and the hidden layer before it are those of `params` (arXiv 2010.11929, §3.2: fine-tuning drops both and starts a
  zero head), or with `keep_head` the file's. Position embeddings are resampled from `old_grid` (None: a square) to `grid`
  patches (height, width) by a method of resample.py; patch kernels of another size by FlexiViT's pseudo-inverse.
  Everything else must be there in the same shape, and nothing of `loaded` left over: UserError that lists what does not fit.
  """
  old, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (loaded, params))
  if keep_head:
    refuse_other_classes(old, new)
  is_head = lambda name: name.startswith(HEAD) and not keep_head
  fitted, wrong = {}, []
  for name, array in new.items():
    if is_head(name) or name.startswith(MASKING):
      fitted[name] = array
    elif name not in old:
      wrong.append(f'{name} is not in the file')
    elif (
      out := fit(name, old[name], array.shape, grid=grid, old_grid=old_grid, method=method)
    ) is not None:
      fitted[name] = out
    else:
      wrong.append(
        f'{name} is {list(old[name].shape)} in the file, {list(array.shape)} in the model'
      )
  wrong += [
    f'{name} {list(old[name].shape)} is not in the model'
    for name in old
    if name not in new and not is_head(name)
  ]
  if wrong:
    more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise UserError('config.init does not fit config.model: ' + '; '.join(wrong[:5]) + more)
  size = lambda tree, name: tree[name].shape if name in tree else None
  changes = [
    Change(name, what(name, old.get(name), array), size(old, name), array.shape)
    for name, array in fitted.items()
  ]
  changes += [Change(name, 'dropped', old[name].shape, None) for name in old if name not in new]
  return flax.traverse_util.unflatten_dict(fitted, sep='/'), changes


def refuse_other_classes(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> None:
  """UserError where both flat trees have a head, of different numbers of classes."""
  theirs, ours = (
    tree['head/bias'].shape[0] if 'head/bias' in tree else None for tree in (old, new)
  )
  if theirs and ours and theirs != ours:
    raise UserError(
      f'the head of config.init has {theirs:,} classes and this task {ours:,}: it cannot be kept, take a new one'
    )


def fit(
  name: str,
  array: np.ndarray,
  wanted: tuple[int, ...],
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None,
  method: str,
) -> np.ndarray | None:
  """The array in the shape that is wanted, itself where it has it; None where there is no way."""
  if name == POSITION and array.ndim == 3 and array.shape[-1] == wanted[-1]:
    return resample_positions(array, wanted[1], grid, old_grid, method)
  if array.shape == wanted:
    return array
  if name == PATCH and array.ndim == 4 and array.shape[2:] == wanted[2:] and wanted[2] == RGB:
    return pi_resize(array, wanted[:2])
  return None


def what(name: str, old: np.ndarray | None, new: np.ndarray) -> str:
  """What became of `old`, in a word."""
  if old is new:
    return 'kept'
  if old is None or name.startswith(HEAD):
    return 'new'
  return 'resampled' if name == POSITION else 'PI-resized'


def table(changes: list[Change]) -> list[str]:
  """The lines of a table: a row for every array that was not simply kept, and one for all that were."""
  text = lambda side: '' if side is None else str(list(side))
  rows = [
    (change.name, change.what, text(change.old), text(change.new))
    for change in changes
    if change.what != 'kept'
  ]
  kept = sum(change.what == 'kept' for change in changes)
  widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
  arrow = lambda old, new: f'{old} -> {new}' if old and new else old or new
  lines = [
    f'{name:{widths[0]}}  {word:{widths[1]}}  {arrow(old, new)}'
    for name, word, old, new in sorted(rows)
  ]
  return [*lines, f'{kept} arrays kept']


def resample_positions(
  positions: np.ndarray,
  tokens: int,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
  method: str = 'corner',
) -> np.ndarray:
  """Position embeddings [1, n, d] of `old_grid` (None: a square) -> [1, tokens, d] for `grid`.

  The rows before the grid, of a class token, stay as they are; so does the whole table where the grids are equal.
  UserError where the numbers of tokens do not work out.
  """
  extra = tokens - math.prod(grid)
  side = math.isqrt(max(0, positions.shape[1] - extra))
  old_grid = old_grid or (side, side)
  if math.prod(old_grid) != positions.shape[1] - extra:
    raise UserError(
      f'{positions.shape[1]} position embeddings are not {extra} for a class token and a grid of '
      f'{old_grid[0]}x{old_grid[1]}: is config.model.pool as it was?'
    )
  if old_grid == grid:
    return positions
  new = resample_grid(positions[0, extra:].reshape(*old_grid, -1), grid, method)
  return np.concatenate([positions[:, :extra], new.reshape(1, math.prod(grid), -1)], axis=1).astype(
    positions.dtype
  )
