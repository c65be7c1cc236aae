"""Adapt loaded parameters to a new task, resolution and patch size.

The head is replaced, position embeddings and patch kernels are resampled, and all other arrays are
unchanged.
"""

import dataclasses

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import (
  PATCH_KERNEL,
  POSITION_EMBEDDING,
  RELATIVE_TABLE,
  summarize_list,
)
from vit_jax.pretrained.equivalents import match_optional_arrays
from vit_jax.pretrained.resample import pi_resize, resample_offsets, resample_positions
from vit_jax.settings.limits import CHANNELS

HEAD_PREFIXES = ('head/', 'pre_logits/')
MASKING_PREFIXES = ('mask', 'patch_head/')  # Only masked patch prediction has these arrays.


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayChange:
  """Change of one array by `adapt_params`.

  `action` is 'kept', 'new', 'resampled', 'PI-resized', 'folded in' or 'dropped'. A shape is None if
  the array does not exist on that side.
  """

  name: str
  action: str
  old_shape: tuple[int, ...] | None
  new_shape: tuple[int, ...] | None


def adapt_params(
  loaded: dict,
  params: dict,
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
  method: str = 'corner',
  keep_head: bool = False,
) -> tuple[dict, list[ArrayChange]]:
  """Return `loaded` in the shapes of `params`, and what happened to every array.

  LayerScale and zero biases are removed or added as the new model has them, which changes nothing.
  The head and the hidden layer before it come from `params`, as in the paper (arXiv 2010.11929,
  §3.2: fine-tuning drops both and starts a zero head). With `keep_head` they come from `loaded`.

  Args:
    loaded: nested parameters of the pre-trained model.
    params: nested parameters of the new model, freshly initialized.
    grid: patches (height, width) of the new model.
    old_grid: patches (height, width) of the loaded model. None means a square.
    method: how to resample position embeddings, a key of RESAMPLE_METHODS in resample.py.
    keep_head: keep the head of `loaded`.

  Raises UserError with a list of the arrays that do not fit.
  """
  stored, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (loaded, params))
  old = match_optional_arrays(stored, new.keys())
  if keep_head:
    check_head_classes(old, new)
  replaced_prefixes = () if keep_head else HEAD_PREFIXES
  fitted = {}
  for name, array in new.items():
    if name.startswith((*replaced_prefixes, *MASKING_PREFIXES)):
      fitted[name] = array
    elif name in old:
      fitted[name] = fit_array(
        name, old[name], array.shape, grid=grid, old_grid=old_grid, method=method
      )
  check_all_fit(old, new, fitted, replaced_prefixes)
  changes = list_changes(stored, old, new, fitted)
  return flax.traverse_util.unflatten_dict(fitted, sep='/'), changes


def list_changes(
  stored: dict[str, np.ndarray],
  old: dict[str, np.ndarray],
  new: dict[str, np.ndarray],
  fitted: dict[str, np.ndarray],
) -> list[ArrayChange]:
  """Return what happened to each array of the file, `stored`, and of the new model."""
  changes = []
  for name, array in fitted.items():
    before = old[name] if name in stored else None
    old_shape = None if before is None else before.shape
    action = describe_change(name, before, array)
    changes.append(ArrayChange(name, action, old_shape, array.shape))
  changes += [
    ArrayChange(name, 'dropped', old[name].shape, None) for name in old if name not in new
  ]
  changes += [
    ArrayChange(name, 'folded in', stored[name].shape, None) for name in stored if name not in old
  ]
  return changes


def check_head_classes(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> None:
  """Raise UserError if both flat trees have a head, with different numbers of classes."""
  old_classes, new_classes = (
    tree['head/bias'].shape[0] if 'head/bias' in tree else None for tree in (old, new)
  )
  if old_classes and new_classes and old_classes != new_classes:
    raise UserError(
      f'the head of config.init has {old_classes:,} classes and this task has {new_classes:,}: '
      'the head cannot be kept; start a new one'
    )


def check_all_fit(
  old: dict[str, np.ndarray],
  new: dict[str, np.ndarray],
  fitted: dict[str, np.ndarray | None],
  replaced_prefixes: tuple[str, ...],
) -> None:
  """Raise UserError if an array is missing from the file, unfit for the model, or unexpected."""
  problems = []
  for name, array in new.items():
    if name not in fitted:
      problems.append(f'{name} is not in the file')
    elif fitted[name] is None:
      problems.append(
        f'{name} is {list(old[name].shape)} in the file, {list(array.shape)} in the model'
      )
  problems += [
    f'{name} {list(array.shape)} is not in the model'
    for name, array in old.items()
    if name not in new and not name.startswith(replaced_prefixes)
  ]
  if problems:
    raise UserError(f'config.init does not fit config.model: {summarize_list(problems)}')


def fit_array(
  name: str,
  array: np.ndarray,
  shape: tuple[int, ...],
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None,
  method: str,
) -> np.ndarray | None:
  """Return the array resampled to `shape`, or None if that is impossible.

  Returns `array` itself if it has this shape already.
  """
  if name == POSITION_EMBEDDING and array.ndim == 3 and array.shape[-1] == shape[-1]:
    return resample_positions(array, shape[1], grid, old_grid, method)
  if name == RELATIVE_TABLE and old_grid and array.shape[::2] == shape[::2]:
    return resample_offsets(array, grid, old_grid)
  if array.shape == shape:
    return array
  same_channels = array.ndim == 4 and array.shape[2:] == shape[2:]
  if name == PATCH_KERNEL and same_channels and shape[2] in CHANNELS:  # A hybrid's are no pixels.
    return pi_resize(array, shape[:2])
  return None


def describe_change(name: str, old: np.ndarray | None, new: np.ndarray) -> str:
  """Return the action that turned `old` into `new`, as in `ArrayChange`."""
  if old is new:
    return 'kept'
  if old is None or name.startswith(HEAD_PREFIXES):
    return 'new'
  return 'resampled' if name in (POSITION_EMBEDDING, RELATIVE_TABLE) else 'PI-resized'


def format_changes(changes: list[ArrayChange]) -> list[str]:
  """Format a table with a row for each array that changed, and the number of unchanged arrays."""

  def format_shapes(change: ArrayChange) -> str:
    shapes = [shape for shape in (change.old_shape, change.new_shape) if shape is not None]
    return ' -> '.join(str(list(shape)) for shape in shapes)

  rows = sorted((change for change in changes if change.action != 'kept'), key=lambda c: c.name)
  name_width = max((len(change.name) for change in rows), default=0)
  action_width = max((len(change.action) for change in rows), default=0)
  lines = [
    f'{change.name:{name_width}}  {change.action:{action_width}}  {format_shapes(change)}'
    for change in rows
  ]
  return [*lines, f'{len(changes) - len(rows)} arrays kept']
