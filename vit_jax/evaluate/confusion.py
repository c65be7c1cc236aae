"""Accuracy by class, and the confusion matrix as numbers and as a picture.

Shapes: n examples, m labels of an example (padded with -1), k classes.
"""

import warnings
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

MAX_CONFUSION_CLASSES = 2000  # A larger picture cannot be read.
_MAX_CLASSES_WITH_NUMBERS = 20  # Up to here, each cell shows its number of examples.
_MAX_CLASSES_WITH_NAMES = 100  # Up to here, axes show names. Beyond, common mistakes are listed.
_MAX_LISTED_MISTAKES = 40
_MAX_NAME_CHARS = 32
_MISTAKES_WIDTH, _MISTAKES_HEIGHT = 9.0, 13.5  # Inches.
_CONFUSION_DPI = 100
_COLORBAR_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
_OTHER_CLASS = 'any other'


def count_per_class(
  labels: np.ndarray, predictions: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return (examples, correct predictions) of each class [k], for labels [n, m].

  An example with several labels counts for each of them.
  """
  correct = ((labels == predictions[:, None]) & (labels >= 0)).any(axis=1)  # [n]

  def count(some: np.ndarray) -> np.ndarray:
    return np.bincount(some[some >= 0], minlength=classes)

  return count(labels), count(labels[correct])


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
  """Return [k, k + 1], the number of examples of class i (rows) predicted as class j.

  The last column counts predictions of -1, a class that the data set does not have.
  """
  matrix = np.zeros((classes, classes + 1), np.int64)
  np.add.at(matrix, (labels[:, 0], predictions), 1)  # -1 is the last column.
  return matrix


def plot_confusion_matrix(
  matrix: np.ndarray, names: tuple[str, ...], path: str | Path, *, title: str
):
  """Write a PNG of a confusion matrix, as fractions of each row.

  With few classes, the axes show their names. With many, the most common mistakes are listed beside
  the picture. Raises UserError if `path` cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # Slow to import.
  from matplotlib.figure import Figure

  matrix = matrix if matrix[:, -1].any() else matrix[:, :-1]
  columns, k = (*names, _OTHER_CLASS)[: matrix.shape[1]], len(names)
  has_numbers, has_names = k <= _MAX_CLASSES_WITH_NUMBERS, k <= _MAX_CLASSES_WITH_NAMES
  side, margin = _matrix_inches(k), 4.5 if has_names else 2.5  # The margin is for names.
  list_width = [] if has_names else [_MISTAKES_WIDTH]
  width = side + margin + sum(list_width)
  height = max(side, _MISTAKES_HEIGHT * len(list_width)) + margin - 1
  figure = Figure(figsize=(width, height), dpi=_CONFUSION_DPI, layout='constrained')
  FigureCanvasAgg(figure)
  ratios = [side + margin, *list_width]
  (axes,) = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)
  _plot_fractions(figure, axes[0], matrix, title, size=10 if has_names else 15)
  if has_names:
    _label_axes(axes[0], names, columns, size=10 if has_numbers else 7)
  else:
    _list_mistakes(axes[1], matrix, columns)
  if has_numbers:
    _annotate_cells(axes[0], matrix)
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # A name may have letters that the font lacks.
      figure.savefig(path, format='png')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def _matrix_inches(classes: int) -> float:
  """Return the side of the matrix in inches. A cell has at least two pixels."""
  cell = 2 / _CONFUSION_DPI
  if classes <= _MAX_CLASSES_WITH_NAMES:
    cell = 0.6 if classes <= _MAX_CLASSES_WITH_NUMBERS else 0.16
  return max(3.5, cell * classes)


def _row_fractions(matrix: np.ndarray) -> np.ndarray:
  """Divide each row by its sum."""
  return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _plot_fractions(figure, axes, matrix: np.ndarray, title: str, *, size: int):
  """Draw the fractions as colours, on a square-root scale that shows rare mistakes."""
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
  bar.set_label("fraction of the label's examples", fontsize=size)


def _label_axes(axes, rows: tuple[str, ...], columns: tuple[str, ...], *, size: int):
  """Write the names of the classes beside rows and columns."""
  column_names, row_names = ([truncate_name(name) for name in names] for names in (columns, rows))
  axes.set_xticks(range(len(columns)), column_names, rotation=90, fontsize=size, parse_math=False)
  axes.set_yticks(range(len(rows)), row_names, fontsize=size, parse_math=False)


def _annotate_cells(axes, matrix: np.ndarray):
  """Write the number of examples into each cell that has any."""
  is_dark = _row_fractions(matrix) > 0.4
  for i, j in np.argwhere(matrix):
    color = 'white' if is_dark[i, j] else 'black'
    axes.text(j, i, f'{matrix[i, j]:,}', ha='center', va='center', fontsize=9, color=color)


def _list_mistakes(axes, matrix: np.ndarray, columns: tuple[str, ...]):
  """List the most common mistakes."""
  wrong = matrix.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind='stable')[:_MAX_LISTED_MISTAKES]
  lines = [
    f'{wrong[i, j]:5,}  {truncate_name(columns[i])} → {truncate_name(columns[j])}'
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
    if wrong[i, j]
  ]
  text = '\n'.join(['The most common mistakes: examples, label → prediction', '', *lines])
  axes.axis('off')
  axes.text(
    0, 1, text, transform=axes.transAxes, va='top', fontsize=14, linespacing=1.5, parse_math=False
  )


def truncate_name(name: str) -> str:
  """Shorten a name to `_MAX_NAME_CHARS` characters."""
  return name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 1] + '…'
