"""Accuracy, loss and predictions of a classifier over a complete split, in the classes of the data.

Shapes: n examples, m labels of an example (padded with -1).
"""

import dataclasses
import time

import numpy as np

from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.evaluate.label_sets import LabelSetByClass, RelabelledSource
from vit_jax.evaluate.outputs import classification, mean_classification_metrics
from vit_jax.optim.losses import LOSSES


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
  relabelled = RelabelledSource(source, label_rule, source.max_labels)
  output = classification(LOSSES[loss])
  evaluator.compile(params, relabelled, output)
  start = time.monotonic()
  rows = evaluator.rows(params, relabelled, output)
  seconds = time.monotonic() - start
  metrics = mean_classification_metrics(rows)
  to_class = _logit_to_class_index(logit_indices)
  return ClassificationResult(
    **metrics,
    skipped=len(source) - metrics['examples'],
    images_per_second=metrics['examples'] / seconds,
    labels=to_class(rows['label'][rows['mask']]),
    predictions=to_class(rows['top5'][rows['mask'], 0]),
  )


def _logit_to_class_index(logit_indices: np.ndarray):
  """Return the function that maps logits to classes of the data set, and other logits to -1."""

  def to_class(logits: np.ndarray) -> np.ndarray:
    size = max(logit_indices.max(), logits.max(initial=0)) + 2  # The last place is that of -1.
    classes = np.full(size, -1, np.int32)
    classes[logit_indices] = np.arange(len(logit_indices))
    return classes[logits]

  return to_class
