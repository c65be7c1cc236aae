"""Figures 7 (right) and 11: the mean attention distance, which is for attention what the receptive field is for a convolution.

Of each head: the distance in pixels between the patch that asks and each that is asked, weighted by the attention, averaged
over the patches that ask and over images. The class token and registers are no place in the image: they are left out as queries
and as keys, and what is left of a row is scaled up to sum 1 again (the paper does not say). In a hybrid a patch is one place of
what the ResNet gives, and as many pixels wide as the ResNet strides.

Shapes: b images, l layers, h heads, n patches of a grid (height, width), t tokens.
"""

import numpy as np


def patch_distances(grid: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
  """Pixels [n, n] between the patches of a grid, `stride` (height, width) pixels apart."""
  y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  gap = lambda places, step: np.subtract.outer(places, places) * step
  return np.hypot(gap(y, stride[0]), gap(x, stride[1]))


def _renormalize_patch_attention(attention: np.ndarray, patches: int, first: int) -> np.ndarray:
  """Attention [..., t, t] -> that of the patches among each other [..., n, n], rows of sum 1; token `first` is the first."""
  chosen = slice(first, first + patches)
  weights = np.asarray(attention[..., chosen, chosen], np.float64)
  return weights / weights.sum(axis=-1, keepdims=True)


def mean_attention_distance(
  attention: np.ndarray, grid: tuple[int, int], stride: tuple[int, int], *, first: int
) -> np.ndarray:
  """Attention [b, l, h, t, t] -> pixels [b, l, h]. `first`: 1 where a class token comes before the patches, else 0."""
  n = grid[0] * grid[1]
  each = np.einsum(
    '...qk,qk->...',
    _renormalize_patch_attention(attention, n, first),
    patch_distances(grid, stride),
  )
  return each / n


def plot_attention_distance(axes, pixels: np.ndarray, *, title: str):
  """A dot for every head [l, h], over the depth."""
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
