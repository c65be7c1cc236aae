"""Figures 7 (right) and 11: mean attention distance.

It is an analogue of the receptive field of a convolution.

For each head: the distance in pixels between the query patch and each key patch, weighted by the
attention, averaged over query patches and images. The class token and registers have no position in
the image. They are dropped as queries and as keys, and the remaining weights are normalized to sum
1 (the paper does not say). In a hybrid a patch is one position of the ResNet's output, as wide in
pixels as the stride of the ResNet.

Shapes: b images, l layers, h heads, n patches of a grid (height, width), t tokens.
"""

import numpy as np


def patch_distances(grid: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
  """Return distances in pixels [n, n] between the patches of a grid.

  `stride` is the (height, width) of a patch in pixels.
  """
  y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  dy, dx = np.subtract.outer(y, y) * stride[0], np.subtract.outer(x, x) * stride[1]
  return np.hypot(dy, dx)


def _renormalize_patch_attention(attention: np.ndarray, patches: int, first: int) -> np.ndarray:
  """Return attention between patches [..., n, n] with rows of sum 1, from attention [..., t, t].

  `first` is the index of the first patch among the tokens.
  """
  chosen = slice(first, first + patches)
  weights = np.asarray(attention[..., chosen, chosen], np.float64)
  return weights / weights.sum(axis=-1, keepdims=True)


def mean_attention_distance(
  attention: np.ndarray, grid: tuple[int, int], stride: tuple[int, int], *, first: int
) -> np.ndarray:
  """Return the mean attention distance in pixels [b, l, h] of attention [b, l, h, t, t].

  `first` is 1 if a class token precedes the patches, else 0.
  """
  n = grid[0] * grid[1]
  each = np.einsum(
    '...qk,qk->...',
    _renormalize_patch_attention(attention, n, first),
    patch_distances(grid, stride),
  )
  return each / n


def plot_attention_distance(axes, pixels: np.ndarray, *, title: str):
  """Plot a dot for each head over the depth. `pixels` are mean distances [l, h]."""
  depth, heads = pixels.shape
  for head in range(heads):
    axes.plot(
      np.arange(depth),
      pixels[:, head],
      'o',
      markersize=4,
      label=f'Head {head + 1}' if head < 3 else None,
    )
  axes.plot([], [], ' ', label='…' if heads > 3 else None)
  axes.set(
    title=title,
    xlabel='Network depth (layer)',
    ylabel='Mean attention distance (pixels)',
    ylim=(0, None),
  )
  axes.legend(loc='lower right')
