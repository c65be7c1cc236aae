"""Fits loaded parameters to another task, resolution and patch: a new head, resampled embeddings, all else as it was."""

import dataclasses

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.resample import pi_resize, resample_positions

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
PATCH_KERNEL = 'embedding/kernel'
HEAD_PREFIXES = ('head/', 'pre_logits/')
MASKING_PREFIXES = (
  'mask',
  'patch_head/',
)  # What masked patch prediction has besides, and begins anew.
RGB_CHANNELS = 3  # Channels of a patch of pixels. One of a hybrid's stem has more, and no size that could be resized.


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayChange:
  """What became of one array: kept, new, resampled, 'PI-resized' or dropped. A shape is None where there was or is none."""

  name: str
  what: str
  old: tuple[int, ...] | None
  new: tuple[int, ...] | None


def adapt_params(
  loaded: dict,
  params: dict,
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
  method: str = 'corner',
  keep_head: bool = False,
) -> tuple[dict, list[ArrayChange]]:
  """(`loaded` in the shapes of `params`, what became of every array).

  The head and the hidden layer before it are those of `params` (arXiv 2010.11929, §3.2: fine-tuning drops both and starts a
  zero head), or with `keep_head` the file's. Position embeddings are resampled from `old_grid` (None: a square) to `grid`
  patches (height, width) by a method of resample.py; patch kernels of another size by FlexiViT's pseudo-inverse.
  Everything else must be there in the same shape, and nothing of `loaded` left over: UserError that lists what does not fit.
  """
  old, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (loaded, params))
  if keep_head:
    check_head_classes(old, new)
  is_head = lambda name: name.startswith(HEAD_PREFIXES) and not keep_head
  fitted, wrong = {}, []
  for name, array in new.items():
    if is_head(name) or name.startswith(MASKING_PREFIXES):
      fitted[name] = array
    elif name not in old:
      wrong.append(f'{name} is not in the file')
    elif (
      out := fit_array(name, old[name], array.shape, grid=grid, old_grid=old_grid, method=method)
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
    ArrayChange(name, describe_change(name, old.get(name), array), size(old, name), array.shape)
    for name, array in fitted.items()
  ]
  changes += [
    ArrayChange(name, 'dropped', old[name].shape, None) for name in old if name not in new
  ]
  return flax.traverse_util.unflatten_dict(fitted, sep='/'), changes


def check_head_classes(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> None:
  """UserError where both flat trees have a head, of different numbers of classes."""
  theirs, ours = (
    tree['head/bias'].shape[0] if 'head/bias' in tree else None for tree in (old, new)
  )
  if theirs and ours and theirs != ours:
    raise UserError(
      f'the head of config.init has {theirs:,} classes and this task {ours:,}: it cannot be kept, take a new one'
    )


def fit_array(
  name: str,
  array: np.ndarray,
  wanted: tuple[int, ...],
  *,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None,
  method: str,
) -> np.ndarray | None:
  """The array in the shape that is wanted, itself where it has it; None where there is no way."""
  if name == POSITION_EMBEDDING and array.ndim == 3 and array.shape[-1] == wanted[-1]:
    return resample_positions(array, wanted[1], grid, old_grid, method)
  if array.shape == wanted:
    return array
  if (
    name == PATCH_KERNEL
    and array.ndim == 4
    and array.shape[2:] == wanted[2:]
    and wanted[2] == RGB_CHANNELS
  ):
    return pi_resize(array, wanted[:2])
  return None


def describe_change(name: str, old: np.ndarray | None, new: np.ndarray) -> str:
  """What became of `old`, in a word."""
  if old is new:
    return 'kept'
  if old is None or name.startswith(HEAD_PREFIXES):
    return 'new'
  return 'resampled' if name == POSITION_EMBEDDING else 'PI-resized'


def format_changes(changes: list[ArrayChange]) -> list[str]:
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
