"""Figures 7 (centre) and 10: how alike the position embeddings are, each to all others. Shapes: n = h·w patches, d width."""

import numpy as np


def similarity(embeddings: np.ndarray) -> np.ndarray:
  """Position embeddings of the patches [n, d], without the class token's -> their cosines [n, n]."""
  x = np.asarray(embeddings, np.float64)
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  return x @ x.T


def means(cosines: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
  """Mean cosine [n, n] over the pairs of patches of a grid (height, width): in one row, in one column, in neither, and of
  neighbours (up, down, left, right). No pair of a patch with itself."""
  y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  dy, dx = (np.abs(np.subtract.outer(each, each)) for each in (y, x))
  pairs = {
    'same row': (dy == 0) & (dx > 0),
    'same column': (dx == 0) & (dy > 0),
    'neither': (dy > 0) & (dx > 0),
    'neighbours': dy + dx == 1,
  }
  return {name: float(cosines[chosen].mean()) for name, chosen in pairs.items()}


def draw(figure, cosines: np.ndarray, grid: tuple[int, int]):
  """A map for each patch, at its place: how alike all positions are to that one."""
  h, w = grid
  figure.suptitle('Position embedding similarity')
  axes = figure.subplots(h, w, squeeze=False)
  for each, row in zip(axes.flat, cosines, strict=True):
    picture = each.imshow(row.reshape(h, w), vmin=-1, vmax=1, cmap='viridis', interpolation='nearest')
    each.set(xticks=[], yticks=[])
  for i in range(h):
    axes[i, 0].set_ylabel(i + 1, rotation=0, va='center', ha='right')
  for j in range(w):
    axes[-1, j].set_xlabel(j + 1)
  figure.supxlabel('Input patch column')
  figure.supylabel('Input patch row')
  figure.colorbar(picture, ax=axes, label='Cosine similarity', ticks=[-1, 1])
