"""Resampling grids as what it is: a matrix [new, old] along each axis. Position embeddings and patch kernels go through it."""

import math

import numpy as np

from vit_jax.errors import UserError

BICUBIC_COEFFICIENT = -0.75  # The coefficient of PyTorch's and OpenCV's bicubic interpolation.


def corner_aligned_matrix(old: int, new: int) -> np.ndarray:
  """Linear, first to first and last to last: `scipy.ndimage.zoom(order=1)`, which the paper's own code calls.

  Half-pixel centres would be off by 7 % for the paper's grids. A single new row is the first old one, as scipy has it.
  """
  return linear_matrix(np.linspace(0, old - 1, new), old)


def half_pixel_matrix(old: int, new: int) -> np.ndarray:
  """Linear between the centres of pixels, without antialiasing: `tf.image.resize`, PyTorch's 'bilinear'."""
  return linear_matrix(np.clip(pixel_centers(old, new), 0, old - 1), old)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
  """Cubic between the centres of pixels, no antialiasing: PyTorch's 'bicubic', by which DINOv2 and Hugging Face resample."""
  at = pixel_centers(old, new)
  first = np.floor(at).astype(int)
  matrix = np.zeros((new, old))
  for offset in (-1, 0, 1, 2):
    x = np.abs(at - first - offset)
    near = ((BICUBIC_COEFFICIENT + 2) * x - (BICUBIC_COEFFICIENT + 3)) * x * x + 1
    far = (
      (BICUBIC_COEFFICIENT * x - 5 * BICUBIC_COEFFICIENT) * x + 8 * BICUBIC_COEFFICIENT
    ) * x - 4 * BICUBIC_COEFFICIENT
    np.add.at(
      matrix, (np.arange(new), np.clip(first + offset, 0, old - 1)), np.where(x <= 1, near, far)
    )
  return matrix


RESAMPLE_METHODS = {
  'corner': corner_aligned_matrix,
  'half_pixel': half_pixel_matrix,
  'bicubic': bicubic_matrix,
}


def pixel_centers(old: int, new: int) -> np.ndarray:
  """Where the centres of `new` pixels lie among the old ones."""
  return (np.arange(new) + 0.5) * old / new - 0.5


def linear_matrix(at: np.ndarray, old: int) -> np.ndarray:
  """Rows that mix the two old places around each of `at`."""
  low = np.minimum(at.astype(int), max(0, old - 2))
  rows, matrix = np.arange(len(at)), np.zeros((len(at), old))
  matrix[rows, low] = 1 - (at - low)
  if old > 1:
    matrix[rows, low + 1] += at - low
  return matrix


def resample_grid(table: np.ndarray, grid: tuple[int, int], method: str = 'corner') -> np.ndarray:
  """[h, w, d] -> [*grid, d] in the table's own type; the very same table where the grid is as it was."""
  if table.shape[:2] == tuple(grid):
    return table
  high, wide = (
    RESAMPLE_METHODS[method](old, new) for old, new in zip(table.shape, grid, strict=False)
  )
  return np.einsum('Hh,Ww,hwd->HWd', high, wide, table, optimize=True).astype(table.dtype)


def pi_resize(kernel: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
  """A patch kernel [p, q, c, d] for patches of another size, by FlexiViT's pseudo-inverse (arXiv 2212.08013, §3.4).

  The new kernel gives a resized patch the embedding that the old one gives the patch: exactly where patches grow, and as
  nearly as least squares can where they shrink.
  """
  high, wide = (
    np.linalg.pinv(half_pixel_matrix(old, new)).T
    for old, new in zip(kernel.shape, patch, strict=False)
  )
  return np.einsum('Pp,Qq,pqcd->PQcd', high, wide, kernel, optimize=True).astype(kernel.dtype)


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
