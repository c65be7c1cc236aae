"""Figures 7 (centre) and 10: cosine similarity of position embeddings.

Shapes: n = h·w patches, d width.
"""

import numpy as np


def position_similarity(embeddings: np.ndarray) -> np.ndarray:
  """Return the cosines [n, n] of the position embeddings of patches [n, d]."""
  x = np.asarray(embeddings, np.float64)
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  return x @ x.T


def mean_similarities(cosines: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
  """Return the mean of the cosines [n, n] over four groups of pairs of different patches.

  The groups are pairs in the same row of the grid, in the same column, in neither, and neighbours
  (up, down, left, right).
  """
  y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  dy, dx = (np.abs(np.subtract.outer(each, each)) for each in (y, x))
  pairs = {
    'same row': (dy == 0) & (dx > 0),
    'same column': (dx == 0) & (dy > 0),
    'neither': (dy > 0) & (dx > 0),
    'neighbours': dy + dx == 1,
  }
  return {name: float(cosines[chosen].mean()) for name, chosen in pairs.items()}


def tile_similarity_maps(cosines: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Tile the similarity map of each patch at its position in the grid.

  Returns an image [h·(h + 1), w·(w + 1)] of the similarities [n, n], with gaps of NaN.
  """
  h, w = grid
  maps = np.pad(
    cosines.reshape(h, w, h, w), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan
  )
  return maps.transpose(0, 2, 1, 3).reshape(h * (h + 1), w * (w + 1))


def plot_position_similarity(figure, cosines: np.ndarray, grid: tuple[int, int]):
  """Plot for each patch, at its position, the similarity of all positions to it."""
  h, w = grid
  axes = figure.subplots()
  picture = axes.imshow(
    tile_similarity_maps(cosines, grid)[:-1, :-1],
    vmin=-1,
    vmax=1,
    cmap='viridis',
    interpolation='nearest',
  )
  axes.set(
    title='Position embedding similarity', xlabel='Input patch column', ylabel='Input patch row'
  )
  axes.set_xticks((w + 1) * np.arange(w) + (w - 1) / 2, np.arange(1, w + 1))
  axes.set_yticks((h + 1) * np.arange(h) + (h - 1) / 2, np.arange(1, h + 1))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  figure.colorbar(picture, ax=axes, label='Cosine similarity', ticks=[-1, 1])
