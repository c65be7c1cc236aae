"""Accuracy, loss and predictions of a classifier over a complete split, in the classes of the data.

Shapes: n examples, m labels of an example (padded with -1), k classes of the data set.
"""

import dataclasses
import time

import numpy as np

from vit_jax.evaluate.confusion import count_per_class
from vit_jax.evaluate.evaluator import Evaluator, Rows
from vit_jax.evaluate.label_sets import LabelSetByClass, RelabelledSource
from vit_jax.evaluate.outputs import classification, mean_classification_metrics
from vit_jax.evaluate.statistics import (
  average_precisions,
  class_statistics,
  expected_calibration_error,
  summarize_classes,
  wilson_interval,
)

_MAX_PROBABILITIES = 1 << 28  # 1 GiB of float32.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationResult:
  """Means over the readable examples of a split, and the prediction for each of them."""

  accuracy: float
  accuracy_top5: float
  loss: float
  examples: int
  skipped: int  # Examples that could not be read.
  images_per_second: float  # Without compilation.
  labels: np.ndarray  # int32 [n, m], classes of the data set.
  predictions: np.ndarray  # int32 [n], classes of the data set; -1 if it does not have the class.
  confidence: np.ndarray  # float32 [n], the probabilities of the predictions.
  top5: np.ndarray  # int32 [n, 5], the best classes of each example, like `predictions`.
  top5_probabilities: np.ndarray  # float32 [n, 5]
  places: np.ndarray  # int64 [n], the index of each example in the split.
  # float32 [n, k] if examples have several labels, unless these are too many numbers.
  probabilities: np.ndarray | None


def evaluate_split(
  evaluator: Evaluator, params: dict, source, *, loss: str, logit_indices: np.ndarray
) -> ClassificationResult:
  """Evaluate every example of `source` once.

  Args:
    evaluator: The model, and what happens to an image on its way to it.
    params: The parameters, on the devices of the evaluator.
    source: The examples.
    loss: 'softmax' or 'sigmoid', a key of `LOSSES`.
    logit_indices: The index of the logit of each class of the data set. Predictions are among all
      logits: one that belongs to no class of the data set is wrong.
  """
  label_rule = LabelSetByClass(tuple((index,) for index in logit_indices.tolist()))
  relabelled = RelabelledSource(source, label_rule, source.max_labels, is_benchmark=False)
  keep_probabilities = source.max_labels > 1 and len(source) * source.classes <= _MAX_PROBABILITIES
  output = classification(loss, tuple(logit_indices.tolist()) if keep_probabilities else ())
  evaluator.compile(params, relabelled, output)
  start = time.monotonic()
  rows = evaluator.rows(params, relabelled, output)
  seconds = time.monotonic() - start
  return summarize_rows(rows, logit_indices, seconds=seconds)


def summarize_rows(
  rows: Rows, logit_indices: np.ndarray, *, seconds: float
) -> ClassificationResult:
  """Return the result of rows of `classification`, which took `seconds` for a complete split.

  Labels are logits, as are the predictions; `logit_indices` is the logit of each class.
  """
  mask, metrics = rows['mask'], mean_classification_metrics(rows)
  top5 = _logit_to_class_index(logit_indices)(rows['top5'][mask])
  return ClassificationResult(
    **metrics,
    skipped=len(mask) - metrics['examples'],
    images_per_second=metrics['examples'] / seconds,
    labels=_logit_to_class_index(logit_indices)(rows['label'][mask]),
    predictions=top5[:, 0],
    confidence=rows['top5_probabilities'][mask, 0],
    top5=top5,
    top5_probabilities=rows['top5_probabilities'][mask],
    places=np.flatnonzero(mask),
    probabilities=rows['probabilities'][mask] if 'probabilities' in rows else None,
  )


def classification_statistics(result: ClassificationResult, loss: str) -> dict[str, float]:
  """Return what follows from the predictions: intervals, F1, calibration, average precision.

  The names are those of the JSON of `evaluate`. Examples with one label have 'macro_precision',
  'macro_recall', 'macro_f1', 'weighted_f1' and, with the softmax loss, 'log_loss'. Examples with
  several labels have 'mean_average_precision' over the classes that occur.
  """
  labels, predictions = result.labels, result.predictions
  is_correct = (labels == predictions[:, None]).any(axis=1)
  low, high = wilson_interval(int(is_correct.sum()), result.examples)
  statistics = {
    'accuracy_low': low,
    'accuracy_high': high,
    'expected_calibration_error': expected_calibration_error(result.confidence, is_correct),
  }
  if labels.shape[1] == 1:
    classes = 1 + max(labels.max(initial=0), predictions.max(initial=0))
    statistics |= summarize_classes(class_statistics(labels, predictions, classes))
    return statistics | ({'log_loss': result.loss} if loss == 'softmax' else {})
  if result.probabilities is not None:
    precisions = average_precisions(result.probabilities, labels)
    if not np.isnan(precisions).all():
      statistics['mean_average_precision'] = float(np.nanmean(precisions))
  return statistics


def class_table(result: ClassificationResult, names: tuple[str, ...]) -> dict[str, list]:
  """Return {column: value of each class}: counts are int, ratios float, NaN without examples.

  The columns are class, examples, correct and accuracy. Then follow precision and f1 if examples
  have one label, and average_precision if they have several. An example with several labels
  counts for each of them.
  """
  k = len(names)
  examples, correct = count_per_class(result.labels, result.predictions, k)
  with np.errstate(invalid='ignore'):  # 0 / 0 is NaN.
    columns = {'examples': examples, 'correct': correct, 'accuracy': correct / examples}
  if result.labels.shape[1] == 1:
    statistics = class_statistics(result.labels, result.predictions, k)
    columns |= {'precision': statistics.precision, 'f1': statistics.f1}
  elif result.probabilities is not None:
    columns['average_precision'] = average_precisions(result.probabilities, result.labels)
  return {'class': list(names)} | {name: values.tolist() for name, values in columns.items()}


def _logit_to_class_index(logit_indices: np.ndarray):
  """Return the function that maps logits to classes of the data set, and other logits to -1."""

  def to_class(logits: np.ndarray) -> np.ndarray:
    size = max(logit_indices.max(), logits.max(initial=0)) + 2  # The last place is that of -1.
    classes = np.full(size, -1, np.int32)
    classes[logit_indices] = np.arange(len(logit_indices))
    return classes[logits]

  return to_class
