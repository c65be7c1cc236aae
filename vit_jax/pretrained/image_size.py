"""The image size of a loaded model, and its position embeddings for that size."""

import math

import flax.linen as nn
import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.architecture import infer_position_grid
from vit_jax.pretrained.arrays import POSITION_EMBEDDING, RELATIVE_TABLE
from vit_jax.pretrained.resample import resample_offsets, resample_positions

ASSUMED_SQUARE_NOTE = (
  'the file does not state an image size: its position embeddings are taken for {}x{} patches'
)
# Largest grid of position embeddings that a size in a file or an override may ask for: 4,096 pixels
# at 16 pixels a patch. One attention matrix of them has 16 GiB in float32.
MAX_POSITIONS = 2**16


def resample_to_size(
  flat: dict[str, np.ndarray], model: nn.Module, facts: dict, source: str
) -> tuple[dict[str, np.ndarray], tuple[int, int], tuple[int, int], list[str]]:
  """Resample position embeddings to the target image size.

  Returns the flat tree, the native image size, the new image size (height, width in pixels), and
  notes.
  """
  name = next((name for name in (POSITION_EMBEDDING, RELATIVE_TABLE) if name in flat), None)
  if name is None:
    native_size = facts.get('size') or default_image_size(facts, model)
    size = target_size(facts, native_size)
    model.shape.grid(size)  # Raises UserError if the model cannot take this size.
    return flat, native_size, size, []
  size_hint = facts.get('size') or facts.get('target_size')
  old_grid = infer_position_grid(flat, model, size_hint, source)
  native_size = tuple(
    side * stride for side, stride in zip(old_grid, model.shape.stride, strict=True)
  )
  size = target_size(facts, native_size)
  grid = model.shape.grid(size)
  if grid == old_grid:
    is_stated = facts.get('checkpoint') or (size_hint and model.shape.grid(size_hint) == old_grid)
    notes = [] if is_stated else [ASSUMED_SQUARE_NOTE.format(*old_grid)]
    return flat, native_size, size, notes
  if math.prod(grid) > MAX_POSITIONS:
    h, w = size
    raise UserError(
      f'{source}: images of {h}x{w} pixels have {math.prod(grid):,} patches, and position '
      f'embeddings are resampled to at most {MAX_POSITIONS:,}: correct the size in its files, or '
      'add a smaller size'
    )
  if name == RELATIVE_TABLE:
    table = resample_offsets(flat[name], grid, old_grid)
  else:
    tokens = flat[name].shape[1] + math.prod(grid) - math.prod(old_grid)
    method = facts.get('positions', 'corner')
    table = resample_positions(flat[name], tokens, grid, old_grid, method)
  note = 'position embeddings resampled from {}x{} to {}x{}'.format(*old_grid, *grid)
  return flat | {name: table}, native_size, size, [note]


def target_size(facts: dict, native_size: tuple[int, int]) -> tuple[int, int]:
  """Return the image size of an override, else that of the file's preprocessing."""
  return native_size if facts.get('keep_size') else facts.get('target_size', native_size)


def default_image_size(facts: dict, model: nn.Module) -> tuple[int, int]:
  """Return the image size (height, width) if neither the arrays nor the file determine it.

  It is the catalogue's size, else the target size, else the largest multiple of the stride up to
  224 pixels.
  """
  if checkpoint := facts.get('checkpoint'):
    return checkpoint.pixels, checkpoint.pixels
  return facts.get('target_size') or tuple(224 // side * side for side in model.shape.stride)
