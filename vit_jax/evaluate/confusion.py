"""An evaluation class by class: a table of accuracies, and a picture of what is taken for what."""

import warnings
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

_MAX_CLASSES_WITH_NUMBERS = 20  # Classes up to which each cell of the picture has its number.
_MAX_CLASSES_WITH_NAMES = 100  # Classes up to which rows and columns have their names; with more, the largest confusions are listed.
MAX_CONFUSION_CLASSES = 2000  # Classes of which a picture can still be read.
_MAX_LISTED_MISTAKES = 40  # Mistakes.
_MAX_NAME_CHARS = 32  # Letters of a name.
_MISTAKES_WIDTH, _MISTAKES_HEIGHT = 9.0, 13.5  # Inches.
_CONFUSION_DPI = 100
_COLORBAR_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
_OTHER_CLASS = 'any other'


def count_per_class(
  labels: np.ndarray, predicted: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """(examples, right ones) of each class [k]. An example of several labels [n, m] counts for each of them."""
  right = ((labels == predicted[:, None]) & (labels >= 0)).any(axis=1)  # [n]
  count = lambda chosen: np.bincount(chosen[chosen >= 0], minlength=classes)
  return count(labels), count(labels[right])


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """[k, k + 1] examples of class i (rows) that were taken for class j; the last column: for one that the data has not."""
  out = np.zeros((classes, classes + 1), np.int64)
  np.add.at(out, (labels[:, 0], predicted), 1)  # -1 is the last column.
  return out


def plot_confusion_matrix(
  matrix: np.ndarray, names: tuple[str, ...], path: str | Path, *, title: str
):
  """Writes a PNG of what `confusion_matrix` gives, each row by its shares.

  Few classes have their names at the rows and columns; of many, the mistakes that happen most are listed beside the picture.
  UserError where nothing can be written there.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # Slow to import.
  from matplotlib.figure import Figure

  matrix = matrix if matrix[:, -1].any() else matrix[:, :-1]
  columns, k = (*names, _OTHER_CLASS)[: matrix.shape[1]], len(names)
  side = max(
    3.5,
    0.6 * k
    if k <= _MAX_CLASSES_WITH_NUMBERS
    else 0.16 * k
    if k <= _MAX_CLASSES_WITH_NAMES
    else 2 * k / _CONFUSION_DPI,
  )  # Inches: two pixels a cell, or more.
  margin = 4.5 if k <= _MAX_CLASSES_WITH_NAMES else 2.5  # For names.
  beside = [_MISTAKES_WIDTH] if k > _MAX_CLASSES_WITH_NAMES else []
  high = max(side, _MISTAKES_HEIGHT * len(beside)) + margin - 1
  figure = Figure(
    figsize=(side + margin + sum(beside), high), dpi=_CONFUSION_DPI, layout='constrained'
  )
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, 1 + len(beside), width_ratios=[side + margin, *beside], squeeze=False)[
    0
  ]
  _plot_fractions(figure, axes[0], matrix, title, size=10 if k <= _MAX_CLASSES_WITH_NAMES else 15)
  if k <= _MAX_CLASSES_WITH_NAMES:
    _label_axes(axes[0], names, columns, size=10 if k <= _MAX_CLASSES_WITH_NUMBERS else 7)
  if k <= _MAX_CLASSES_WITH_NUMBERS:
    _annotate_cells(axes[0], matrix)
  if k > _MAX_CLASSES_WITH_NAMES:
    _list_mistakes(axes[1], matrix, columns)
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # A name in letters that the font has not.
      figure.savefig(path, format='png')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def _row_fractions(matrix: np.ndarray) -> np.ndarray:
  """Each row divided by its sum."""
  return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _plot_fractions(figure, axes, matrix: np.ndarray, title: str, *, size: int):
  """The shares in colours. Their square root, so that one mistake among many examples shows."""
  from matplotlib.colors import PowerNorm

  drawn = axes.imshow(
    _row_fractions(matrix), cmap='Blues', norm=PowerNorm(0.5, 0, 1), interpolation='nearest'
  )
  axes.set_title(title, fontsize=size + 2, parse_math=False)
  axes.set_xlabel('predicted', fontsize=size)
  axes.set_ylabel('label', fontsize=size)
  axes.tick_params(labelsize=size)
  bar = figure.colorbar(
    drawn, ax=axes, shrink=0.6, aspect=30, fraction=0.05, ticks=_COLORBAR_TICKS, format='{x:.0%}'
  )
  bar.ax.tick_params(labelsize=size)
  bar.set_label("share of the label's examples", fontsize=size)


def _label_axes(axes, rows: tuple[str, ...], columns: tuple[str, ...], *, size: int):
  """At both sides."""
  axes.set_xticks(
    range(len(columns)),
    [truncate_name(name) for name in columns],
    rotation=90,
    fontsize=size,
    parse_math=False,
  )
  axes.set_yticks(
    range(len(rows)), [truncate_name(name) for name in rows], fontsize=size, parse_math=False
  )


def _annotate_cells(axes, matrix: np.ndarray):
  """The number of examples in each cell that has any."""
  dark = _row_fractions(matrix) > 0.4
  for i, j in np.argwhere(matrix):
    axes.text(
      j,
      i,
      f'{matrix[i, j]:,}',
      ha='center',
      va='center',
      fontsize=9,
      color='white' if dark[i, j] else 'black',
    )


def _list_mistakes(axes, matrix: np.ndarray, columns: tuple[str, ...]):
  """What happens most of all that is wrong."""
  wrong = matrix.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind='stable')[:_MAX_LISTED_MISTAKES]
  pairs = [
    (i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]
  ]
  lines = [
    f'{wrong[i, j]:5,}  {truncate_name(columns[i])} → {truncate_name(columns[j])}' for i, j in pairs
  ]
  text = '\n'.join(['The commonest mistakes: examples, label → predicted', '', *lines])
  axes.axis('off')
  axes.text(
    0, 1, text, transform=axes.transAxes, va='top', fontsize=14, linespacing=1.5, parse_math=False
  )


def truncate_name(name: str) -> str:
  """At most so much of a name as there is room for."""
  return name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 1] + '…'
