"""Fits loaded parameters to another task and resolution: a new head, resampled position embeddings, all else as it was."""

import math

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError

POSITION = 'Transformer/posembed_input/pos_embedding'


def adapt(
  loaded: dict, params: dict, *, grid: tuple[int, int], old_grid: tuple[int, int] | None = None
) -> tuple[dict, list[str]]:
  """(`loaded` in the shapes of `params`, one line for each array that was not simply kept).

  The head and the hidden layer before it are those of `params` (arXiv 2010.11929, §3.2: fine-tuning drops both and
  starts a zero head). Position embeddings are resampled from `old_grid` (None: a square) to `grid` patches (height, width).
  Everything else must be there in the same shape, and nothing of `loaded` left over: UserError that lists what does not fit.
  """
  old, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (loaded, params))
  is_head = lambda name: name.startswith(('head/', 'pre_logits/'))
  out, notes, wrong = {}, [], []
  for name, array in new.items():
    if is_head(name):
      out[name] = array
      notes.append(f'{name} {list(array.shape)} new')
    elif name not in old:
      wrong.append(f'{name} is not in the file')
    elif name == POSITION and old[name].ndim == 3 and old[name].shape[-1] == array.shape[-1]:
      out[name] = resample_positions(old[name], array.shape[1], grid, old_grid)
      if out[name] is not old[name]:
        notes.append(f'{name} {list(old[name].shape)} resampled to {list(array.shape)}')
    elif old[name].shape == array.shape:
      out[name] = old[name]
    else:
      wrong.append(f'{name} is {list(old[name].shape)} in the file, {list(array.shape)} in the model')
  wrong += [f'{name} {list(old[name].shape)} is not in the model' for name in old if name not in new and not is_head(name)]
  notes += [f'{name} {list(old[name].shape)} dropped' for name in old if name not in new and is_head(name)]
  if wrong:
    more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise UserError('config.init does not fit config.model: ' + '; '.join(wrong[:5]) + more)
  return flax.traverse_util.unflatten_dict(out, sep='/'), notes


def resample_positions(
  table: np.ndarray, tokens: int, grid: tuple[int, int], old_grid: tuple[int, int] | None = None
) -> np.ndarray:
  """Position embeddings [1, n, d] of `old_grid` (None: a square) -> [1, tokens, d] for `grid`.

  The rows before the grid, of a class token, stay as they are; so does the whole table where the grids are equal.
  UserError where the numbers of tokens do not work out.
  """
  extra = tokens - math.prod(grid)
  side = math.isqrt(table.shape[1] - extra)
  old_grid = old_grid or (side, side)
  if math.prod(old_grid) != table.shape[1] - extra:
    raise UserError(
      f'{table.shape[1]} position embeddings are not {extra} for a class token and a grid of '
      f'{old_grid[0]}x{old_grid[1]}: is config.model.pool as it was?'
    )
  if old_grid == grid:
    return table
  new = zoom_grid(table[0, extra:].reshape(*old_grid, -1), grid)
  return np.concatenate([table[:, :extra], new.reshape(1, math.prod(grid), -1)], axis=1).astype(table.dtype)


def zoom_grid(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """[h, w, d] -> [*grid, d], linear and corner-aligned: corners stay corners. What the paper's code does, by
  `scipy.ndimage.zoom(order=1)`; half-pixel resampling would be off by 7 %."""
  for axis, side in enumerate(grid):
    if side == table.shape[axis]:
      continue
    position = np.linspace(0, table.shape[axis] - 1, side)
    low = np.minimum(position.astype(int), max(0, table.shape[axis] - 2))
    share = (position - low).reshape([-1 if i == axis else 1 for i in range(3)])
    high = np.minimum(low + 1, table.shape[axis] - 1)
    table = (1 - share) * np.take(table, low, axis) + share * np.take(table, high, axis)
  return table
