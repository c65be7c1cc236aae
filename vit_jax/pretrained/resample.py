"""Resampling grids as what it is: a matrix [new, old] along each axis. Position embeddings and patch kernels go through it."""

import numpy as np

CUBIC = -0.75  # The coefficient of PyTorch's and OpenCV's bicubic interpolation.


def corner(old: int, new: int) -> np.ndarray:
  """Linear, first to first and last to last: `scipy.ndimage.zoom(order=1)`, which the paper's own code calls.

  Half-pixel centres would be off by 7 % for the paper's grids. A single new row is the first old one, as scipy has it.
  """
  return linear(np.linspace(0, old - 1, new), old)


def half_pixel(old: int, new: int) -> np.ndarray:
  """Linear between the centres of pixels, without antialiasing: `tf.image.resize`, PyTorch's 'bilinear'."""
  return linear(np.clip(centres(old, new), 0, old - 1), old)


def bicubic(old: int, new: int) -> np.ndarray:
  """Cubic between the centres of pixels, no antialiasing: PyTorch's 'bicubic', by which DINOv2 and Hugging Face resample."""
  at = centres(old, new)
  first = np.floor(at).astype(int)
  matrix = np.zeros((new, old))
  for offset in (-1, 0, 1, 2):
    x = np.abs(at - first - offset)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    np.add.at(
      matrix, (np.arange(new), np.clip(first + offset, 0, old - 1)), np.where(x <= 1, near, far)
    )
  return matrix


METHODS = {'corner': corner, 'half_pixel': half_pixel, 'bicubic': bicubic}


def centres(old: int, new: int) -> np.ndarray:
  """Where the centres of `new` pixels lie among the old ones."""
  return (np.arange(new) + 0.5) * old / new - 0.5


def linear(at: np.ndarray, old: int) -> np.ndarray:
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
  high, wide = (METHODS[method](old, new) for old, new in zip(table.shape, grid, strict=False))
  return np.einsum('Hh,Ww,hwd->HWd', high, wide, table, optimize=True).astype(table.dtype)


def pi_resize(kernel: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
  """A patch kernel [p, q, c, d] for patches of another size, by FlexiViT's pseudo-inverse (arXiv 2212.08013, §3.4).

  The new kernel gives a resized patch the embedding that the old one gives the patch: exactly where patches grow, and as
  nearly as least squares can where they shrink.
  """
  high, wide = (
    np.linalg.pinv(half_pixel(old, new)).T for old, new in zip(kernel.shape, patch, strict=False)
  )
  return np.einsum('Pp,Qq,pqcd->PQcd', high, wide, kernel, optimize=True).astype(kernel.dtype)
