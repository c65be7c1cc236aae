"""Figure 7, left: the principal components of the patch embedding's filters, as pictures."""

import numpy as np

_PRINCIPAL_COMPONENTS = 28
_FILTER_COLUMNS = 7


def compute_filter_components(
  kernel: np.ndarray, count: int = _PRINCIPAL_COMPONENTS
) -> tuple[np.ndarray, np.ndarray]:
  """The filters [h, w, 3, d] of a patch embedding -> (the first principal components [count, h, w, 3] of length 1, the share
  [count] of the variance that each explains).

  A component's sign says nothing; here its largest number is positive. Fewer come of fewer filters.
  """
  h, w, c, d = kernel.shape
  filters = np.asarray(kernel, np.float64).reshape(-1, d).T  # [d, h·w·c]
  _, singular, axes = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
  axes, singular = axes[:count], singular**2
  largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
  return (axes * np.sign(largest)).reshape(-1, h, w, c), singular[:count] / singular.sum()


def components_to_rgb(components: np.ndarray) -> np.ndarray:
  """Components [k, h, w, 3] -> colours in [0, 1], each by its own largest number: grey is 0."""
  return components / (2 * np.abs(components).max(axis=(1, 2, 3), keepdims=True)) + 0.5


def low_frequency_energy(components: np.ndarray) -> np.ndarray:
  """The share [k] of each component's energy in waves at least as long as the patch, in height and in width.

  Of noise it is the share that such waves have of all, 9 of h·w; of a trained model far more, or far less.
  """
  power = np.abs(np.fft.fft2(components, axes=(1, 2))) ** 2  # [k, h, w, 3]
  wave = lambda n: np.minimum(np.arange(n), n - np.arange(n))
  slow = np.maximum.outer(wave(components.shape[1]), wave(components.shape[2])) <= 1
  return power[:, slow].sum(axis=(1, 2)) / power.sum(axis=(1, 2, 3))


def plot_filters(figure, components: np.ndarray):
  """Four rows of seven, as in the paper."""
  rows = -(-len(components) // _FILTER_COLUMNS)
  figure.suptitle('RGB embedding filters\n(first 28 principal components)')
  axes = figure.subplots(rows, _FILTER_COLUMNS, squeeze=False)
  for each in axes.flat:
    each.axis('off')
  for each, tile in zip(axes.flat, components_to_rgb(components), strict=False):
    each.imshow(tile, interpolation='nearest')
