"""The sections about predictions: classes, confusions, calibration, mistakes, uncertain examples.

Shapes: n examples, m labels of an example (padded with -1), k classes.
"""

import dataclasses
import math

import numpy as np

from vit_jax.evaluate.classify import ClassificationResult, class_table, classification_statistics
from vit_jax.evaluate.confusion import confusion_matrix
from vit_jax.evaluate.statistics import class_statistics, summarize_classes

SHOWN_EXAMPLES = 24  # Of the most confident mistakes, and of the least certain examples.
MAX_LISTED_CLASSES = 1000  # Above, the page lists the classes with the lowest F1 or recall.
MAX_MATRIX_CLASSES = 25  # Above, the page lists the most common confusions instead.
_MAX_LISTED_CONFUSIONS = 50
_IMAGES_PER_CELL = 8
_MAX_CELL_IMAGES = 480
_OTHER_CLASS = 'any other class'


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
  """A cell of the confusion matrix: how many examples, and the places of some of them."""

  label: str
  prediction: str
  count: int
  fraction: float  # Of the examples with the label.
  places: tuple[int, ...]
  correct: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
  """The sections about the predictions for a split. `None` means that a part does not apply."""

  examples: int
  skipped: int
  statistics: dict[str, float]
  accuracy: float
  classes: int
  columns: list[str]
  rows: list[list]  # The class, then a number for each other column, NaN without examples.
  means: list[tuple[str, list]]  # (name, the columns of `rows` but the first)
  matrix: list[tuple[str, list[Cell]]] | None  # (label, cells)
  predicted_names: tuple[str, ...]
  confusions: list[Cell]  # The most common ones first.
  mistakes: list[dict]
  uncertain: list[dict]

  @property
  def places(self) -> list[int]:
    """The examples whose images are shown, by their index in the split."""
    cells = [cell for _, row in self.matrix or () for cell in row] + self.confusions
    shown = [place for cell in cells for place in cell.places]
    shown += [example['place'] for example in self.mistakes + self.uncertain]
    return list(dict.fromkeys(shown))


def summarize_predictions(
  result: ClassificationResult, names: tuple[str, ...], loss: str
) -> Predictions:
  """Return what the page shows about a result on data with the classes `names`."""
  columns, rows, means = _class_rows(result, names)
  correct = (result.labels == result.predictions[:, None]).any(axis=1)
  matrix, confusions = _confusions(result, names)
  wrong = np.flatnonzero(~correct)
  confident = wrong[np.argsort(-result.confidence[wrong], kind='stable')][:SHOWN_EXAMPLES]
  uncertain = np.argsort(result.confidence, kind='stable')[:SHOWN_EXAMPLES]
  return Predictions(
    examples=result.examples,
    skipped=result.skipped,
    statistics=classification_statistics(result, loss),
    accuracy=result.accuracy,
    classes=len(names),
    columns=columns,
    rows=_worst_classes(columns, rows),
    means=means,
    matrix=matrix,
    predicted_names=(*names, _OTHER_CLASS)[: len(matrix[0][1])] if matrix else (),
    confusions=confusions,
    mistakes=[_describe_example(result, i, names) for i in confident],
    uncertain=[_describe_example(result, i, names) for i in uncertain],
  )


def _class_rows(
  result: ClassificationResult, names: tuple[str, ...]
) -> tuple[list[str], list[list], list[tuple[str, list]]]:
  """Return (columns, a row for each class, rows of means)."""
  if result.labels.shape[1] > 1:  # Precision needs the predictions of all classes.
    table = class_table(result, names)
    columns = [name for name in table if name not in ('class', 'correct')]
    rows = [list(row) for row in zip(table['class'], *map(table.get, columns), strict=True)]
    return [{'accuracy': 'recall'}.get(name, name) for name in columns], rows, []
  k = len(names)
  each = class_statistics(result.labels, result.predictions, k)
  values = [each.precision, each.recall, each.f1]
  lists = [array.tolist() for array in (*values, each.examples)]
  rows = [[name, *row] for name, *row in zip(names, *lists, strict=True)]
  macro, weights = summarize_classes(each), each.examples
  weighted = [
    float(np.average(np.nan_to_num(array), weights=weights)) if weights.any() else math.nan
    for array in values
  ]
  total = int(each.examples.sum())
  means = [
    ('macro mean', [*(macro.get(f'macro_{name}', math.nan) for name in _RATIOS), total]),
    ('weighted mean', [*weighted, total]),
  ]
  return [*_RATIOS, 'examples'], rows, means


def _worst_classes(columns: list[str], rows: list[list]) -> list[list]:
  """Return the rows of the classes with the lowest F1 or recall, in their order."""
  column = 1 + columns.index('f1' if 'f1' in columns else 'recall')
  scores = np.array([row[column] for row in rows], float)
  worst = np.sort(np.argsort(scores, kind='stable')[:MAX_LISTED_CLASSES])  # NaN is last.
  return [rows[i] for i in worst]


_RATIOS = ('precision', 'recall', 'f1')


def _confusions(
  result: ClassificationResult, names: tuple[str, ...]
) -> tuple[list[tuple[str, list[Cell]]] | None, list[Cell]]:
  """Return (the confusion matrix or None, the most common confusions)."""
  if result.labels.shape[1] > 1 or not result.examples:
    return None, []
  counts = confusion_matrix(result.labels, result.predictions, len(names))
  counts = counts if counts[:, -1].any() else counts[:, :-1]
  columns, totals = (*names, _OTHER_CLASS), np.maximum(counts.sum(axis=1), 1)
  off_diagonal = counts.copy()
  np.fill_diagonal(off_diagonal, 0)
  order = np.argsort(-off_diagonal, axis=None, kind='stable')[: int((off_diagonal > 0).sum())]
  wrong = [divmod(int(at), counts.shape[1]) for at in order]
  is_matrix = len(names) <= MAX_MATRIX_CLASSES
  shown = wrong[:_MAX_LISTED_CONFUSIONS]
  if is_matrix:
    shown += [(i, i) for i in range(len(names))] + wrong[_MAX_LISTED_CONFUSIONS:]
  places = _choose_images(result, shown, counts.shape[1])

  def cell(i: int, j: int) -> Cell:
    count = int(counts[i, j])
    fraction = float(count / totals[i])
    return Cell(names[i], columns[j], count, fraction, places.get((i, j), ()), i == j)

  if not is_matrix:
    return None, [cell(i, j) for i, j in shown]
  rows = range(counts.shape[1])
  return [(name, [cell(i, j) for j in rows]) for i, name in enumerate(names)], []


def _choose_images(
  result: ClassificationResult, cells: list[tuple[int, int]], columns: int
) -> dict[tuple[int, int], tuple[int, ...]]:
  """Return the places of the most confident examples of each cell, within the limits."""
  predictions = np.where(result.predictions < 0, columns - 1, result.predictions)
  by_confidence = np.argsort(-result.confidence, kind='stable')
  members: dict[tuple[int, int], list[int]] = {}
  for i in by_confidence.tolist():
    key = (int(result.labels[i, 0]), int(predictions[i]))
    if len(chosen := members.setdefault(key, [])) < _IMAGES_PER_CELL:
      chosen.append(int(result.places[i]))
  out, left = {}, _MAX_CELL_IMAGES
  for key in cells:
    out[key] = tuple(members.get(key, [])[:left])
    left -= len(out[key])
  return out


def _describe_example(result: ClassificationResult, i: int, names: tuple[str, ...]) -> dict:
  """Return the labels and the most probable classes of an example of the result."""
  named = lambda place: names[place] if place >= 0 else _OTHER_CLASS
  best = zip(result.top5[i].tolist(), result.top5_probabilities[i].tolist(), strict=True)
  return {
    'place': int(result.places[i]),
    'labels': [named(label) for label in result.labels[i].tolist() if label >= 0],
    'guesses': [(named(place), probability) for place, probability in list(best)[:3]],
  }
