"""Figure 7 (left): the principal components of the filters of the patch embedding, as images."""

import numpy as np

_PRINCIPAL_COMPONENTS = 28
_FILTER_COLUMNS = 7


def compute_filter_components(
  kernel: np.ndarray, count: int = _PRINCIPAL_COMPONENTS
) -> tuple[np.ndarray, np.ndarray]:
  """Return the principal components of a patch embedding [h, w, 3, d] and their variance.

  The components [count, h, w, 3] have norm 1. The sign of a component is arbitrary: its largest
  number is made positive. The explained variance [count] is a fraction of the total. Fewer filters
  give fewer components.
  """
  h, w, c, d = kernel.shape
  filters = np.asarray(kernel, np.float64).reshape(-1, d).T  # [d, h·w·c]
  _, singular, axes = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
  axes, singular = axes[:count], singular**2
  largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
  return (axes * np.sign(largest)).reshape(-1, h, w, c), singular[:count] / singular.sum()


def components_to_rgb(components: np.ndarray) -> np.ndarray:
  """Scale components [k, h, w, 3] to colors in [0, 1], each by its largest number; 0 is grey."""
  return components / (2 * np.abs(components).max(axis=(1, 2, 3), keepdims=True)) + 0.5


def low_frequency_energy(components: np.ndarray) -> np.ndarray:
  """Return the fraction [k] of each component's energy in waves at least as long as the patch.

  For noise it is the fraction of such waves among all, 9 of h·w. For a trained model it is far
  larger, or far smaller.
  """
  power = np.abs(np.fft.fft2(components, axes=(1, 2))) ** 2  # [k, h, w, 3]
  # Frequency along each axis, in waves for each patch.
  fy, fx = (np.minimum(np.arange(n), n - np.arange(n)) for n in components.shape[1:3])
  slow = np.maximum.outer(fy, fx) <= 1
  return power[:, slow].sum(axis=(1, 2)) / power.sum(axis=(1, 2, 3))


def plot_filters(figure, components: np.ndarray):
  """Plot the components in rows of seven, as in the paper."""
  rows = -(-len(components) // _FILTER_COLUMNS)
  figure.suptitle('RGB embedding filters\n(first 28 principal components)')
  axes = figure.subplots(rows, _FILTER_COLUMNS, squeeze=False)
  for each in axes.flat:
    each.axis('off')
  for each, tile in zip(axes.flat, components_to_rgb(components), strict=False):
    each.imshow(tile, interpolation='nearest')
