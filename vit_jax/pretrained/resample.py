"""Resample position embeddings and patch kernels. Each axis is resampled by a matrix [new, old]."""

import math

import numpy as np

from vit_jax.errors import UserError

BICUBIC_COEFFICIENT = -0.75  # The coefficient of PyTorch's and OpenCV's bicubic interpolation.


def corner_aligned_matrix(old: int, new: int) -> np.ndarray:
  """Return the linear interpolation that maps first to first and last to last.

  It equals `scipy.ndimage.zoom(order=1)`, which the paper's own code calls. Half-pixel centers
  would be off by 7 % for the paper's grids. If `new` is 1, the result is the first old row, as in
  scipy.
  """
  return linear_matrix(np.linspace(0, old - 1, new), old)


def half_pixel_matrix(old: int, new: int) -> np.ndarray:
  """Return the linear interpolation between pixel centers, without antialiasing.

  It equals `tf.image.resize` and PyTorch's 'bilinear'.
  """
  return linear_matrix(np.clip(pixel_centers(old, new), 0, old - 1), old)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
  """Return the cubic interpolation between pixel centers, without antialiasing.

  It equals PyTorch's 'bicubic', with which DINOv2 and Hugging Face resample.
  """
  at = pixel_centers(old, new)
  first = np.floor(at).astype(int)
  matrix, a = np.zeros((new, old)), BICUBIC_COEFFICIENT
  for offset in (-1, 0, 1, 2):
    x = np.abs(at - first - offset)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    column = np.clip(first + offset, 0, old - 1)
    np.add.at(matrix, (np.arange(new), column), np.where(x <= 1, near, far))
  return matrix


RESAMPLE_METHODS = {
  'corner': corner_aligned_matrix, 'half_pixel': half_pixel_matrix, 'bicubic': bicubic_matrix,
}  # fmt: skip


def geometric_matrix(old: int, new: int) -> np.ndarray:
  """Return the linear interpolation of offsets that BEiT's authors and timm apply.

  The old offsets move to 0, ±1, ±(1 + q), ±(1 + q + q²) and so on, with q from 1.01 to 1.5 such
  that the last is about the largest new offset. Small offsets then keep their values.
  """
  half, low, high, q = old // 2, 1.01, 1.5, 1.5
  while high - low > 1e-6:  # The bound of timm, whose last q is neither end.
    q = (low + high) / 2
    too_far = (1 - q**half) / (1 - q) > new // 2
    low, high = (low, q) if too_far else (q, high)
  steps = np.cumsum(q ** np.arange(half))
  places = np.concatenate([-steps[::-1], [0], steps])
  at = np.interp(np.arange(new) - new // 2, places, np.arange(old))
  return linear_matrix(at, old)


def pixel_centers(old: int, new: int) -> np.ndarray:
  """Return the positions [new] of the new pixel centers, in units of old pixels."""
  return (np.arange(new) + 0.5) * old / new - 0.5


def linear_matrix(at: np.ndarray, old: int) -> np.ndarray:
  """Return rows that interpolate between the two old positions around each element of `at`."""
  low = np.minimum(at.astype(int), max(0, old - 2))
  rows, matrix = np.arange(len(at)), np.zeros((len(at), old))
  matrix[rows, low] = 1 - (at - low)
  if old > 1:
    matrix[rows, low + 1] += at - low
  return matrix


def resample_grid(table: np.ndarray, grid: tuple[int, int], method: str = 'corner') -> np.ndarray:
  """Resample [h, w, d] to [*grid, d] in the same dtype.

  Returns `table` itself if the grid is unchanged.
  """
  if table.shape[:2] == tuple(grid):
    return table
  vertical, horizontal = (
    RESAMPLE_METHODS[method](old, new) for old, new in zip(table.shape, grid, strict=False)
  )
  resampled = np.einsum('Hh,Ww,hwd->HWd', vertical, horizontal, table, optimize=True)
  return resampled.astype(table.dtype)


def resample_positions(
  positions: np.ndarray,
  tokens: int,
  grid: tuple[int, int],
  old_grid: tuple[int, int] | None = None,
  method: str = 'corner',
) -> np.ndarray:
  """Resample position embeddings [1, n, d] to [1, tokens, d].

  Grids are (height, width) in patches. `old_grid=None` means a square. Rows before the grid, such
  as the class token's, are unchanged. Returns `positions` itself if the grids are equal.

  Raises UserError if the numbers of tokens do not match the grids.
  """
  extra = tokens - math.prod(grid)
  side = math.isqrt(max(0, positions.shape[1] - extra))
  old_grid = old_grid or (side, side)
  if math.prod(old_grid) != positions.shape[1] - extra:
    raise UserError(
      f'{positions.shape[1]} position embeddings do not match {extra} class tokens and a grid of '
      f'{old_grid[0]}x{old_grid[1]}: check that config.model.pool and '
      'config.model.distillation_token are those of the loaded model'
    )
  if old_grid == grid:
    return positions
  new = resample_grid(positions[0, extra:].reshape(*old_grid, -1), grid, method)
  new = new.reshape(1, math.prod(grid), -1)
  return np.concatenate([positions[:, :extra], new], axis=1).astype(positions.dtype)


def resample_offsets(
  table: np.ndarray, grid: tuple[int, int], old_grid: tuple[int, int]
) -> np.ndarray:
  """Resample a table of relative positions [l, rows, heads] to another grid, as timm does for BEiT.

  Grids are (height, width) in patches. The rows of the class token, the last ones, are unchanged.
  """
  if grid == old_grid:
    return table
  old, new = ([2 * side - 1 for side in sides] for sides in (old_grid, grid))
  offsets, extra = np.split(table, [math.prod(old)], axis=1)
  vertical, horizontal = map(geometric_matrix, old, new)
  offsets = offsets.reshape(len(table), *old, -1)
  offsets = np.einsum('Yy,Xx,lyxh->lYXh', vertical, horizontal, offsets, optimize=True)
  offsets = offsets.reshape(len(table), math.prod(new), -1)
  return np.concatenate([offsets, extra], axis=1).astype(table.dtype)


def pi_resize(kernel: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
  """Resize a patch kernel [p, q, c, d] by FlexiViT's pseudo-inverse (arXiv 2212.08013, §3.4).

  The new kernel gives a resized patch the embedding that the old kernel gives the original patch.
  The match is exact if patches grow, and the least-squares optimum if they shrink.
  """
  vertical, horizontal = (
    np.linalg.pinv(half_pixel_matrix(old, new)).T
    for old, new in zip(kernel.shape, patch, strict=False)
  )
  resized = np.einsum('Pp,Qq,pqcd->PQcd', vertical, horizontal, kernel, optimize=True)
  return resized.astype(kernel.dtype)
