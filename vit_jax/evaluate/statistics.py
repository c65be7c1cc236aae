"""Statistics of a classifier over a split: intervals, precision and recall, calibration.

Shapes: n examples, m labels of an example (padded with -1), k classes.
"""

import dataclasses
import math

import numpy as np

CONFIDENCE_95 = 1.959963984540054  # The 97.5 % quantile of the normal distribution.
CALIBRATION_BINS = 15  # As in Guo et al., "On Calibration of Modern Neural Networks", 2017.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassStatistics:
  """Counts and ratios of each class [k], for examples with one label."""

  examples: np.ndarray  # Examples with this label.
  predicted: np.ndarray  # Examples for which this class was predicted.
  correct: np.ndarray  # Examples of both kinds.
  precision: np.ndarray  # correct / predicted; NaN if the class was never predicted.
  recall: np.ndarray  # correct / examples; NaN if the class has no examples.
  f1: np.ndarray  # 2 correct / (examples + predicted); NaN if both are 0.


def wilson_interval(correct: int, examples: int, z: float = CONFIDENCE_95) -> tuple[float, float]:
  """Return Wilson's score interval of an accuracy, by default with 95 % confidence.

  Unlike the normal approximation, it stays in [0, 1] and is not empty at an accuracy of 100 %.
  Returns (0.0, 1.0) without examples.
  """
  if not examples:
    return 0.0, 1.0
  p, n = correct / examples, examples
  center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half_width = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  return max(0.0, center - half_width), min(1.0, center + half_width)


def class_statistics(labels: np.ndarray, predictions: np.ndarray, classes: int) -> ClassStatistics:
  """Return the statistics of each class from labels [n, 1] and predictions [n].

  A prediction of -1, a class that the data set does not have, is a mistake of no class.
  """
  labels = labels[:, 0]
  examples, predicted, correct = (
    np.bincount(some[some >= 0], minlength=classes)
    for some in (labels, predictions, labels[labels == predictions])
  )
  with np.errstate(invalid='ignore'):  # 0 / 0 is NaN.
    return ClassStatistics(
      examples=examples,
      predicted=predicted,
      correct=correct,
      precision=correct / predicted,
      recall=correct / examples,
      f1=2 * correct / (examples + predicted),
    )


def summarize_classes(statistics: ClassStatistics) -> dict[str, float]:
  """Return macro means over the classes with examples, and F1 weighted by their numbers.

  The precision of a class that was never predicted counts as 0, as in scikit-learn.
  """
  has_examples = statistics.examples > 0
  values = {
    name: np.nan_to_num(getattr(statistics, name)[has_examples], nan=0.0)
    for name in ('precision', 'recall', 'f1')
  }
  if not has_examples.any():
    return {}
  weights = statistics.examples[has_examples]
  means = {f'macro_{name}': float(each.mean()) for name, each in values.items()}
  return means | {'weighted_f1': float(np.average(values['f1'], weights=weights))}


def calibration_curve(
  confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return (examples, mean confidence, accuracy) of bins of equal width in confidence.

  Args:
    confidence: The probability of the predicted class, [n].
    correct: Whether the prediction is correct, bool [n].
    bins: Number of bins. Bin i contains the confidences in (i / bins, (i + 1) / bins].

  Returns three arrays [bins]; means of an empty bin are 0.
  """
  index = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
  examples = np.bincount(index, minlength=bins)
  mean_confidence, accuracy = (
    np.bincount(index, weights=values, minlength=bins) / np.maximum(examples, 1)
    for values in (confidence, correct)
  )
  return examples, mean_confidence, accuracy


def expected_calibration_error(
  confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> float:
  """Return the mean difference between confidence and accuracy, over bins of confidence.

  The arguments are those of `calibration_curve`. Each bin counts by its number of examples.
  """
  examples, mean_confidence, accuracy = calibration_curve(confidence, correct, bins)
  gaps = np.abs(mean_confidence - accuracy)
  return float((examples * gaps).sum() / max(1, examples.sum()))


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
  """Return the area under the precision-recall curve as a step function, or NaN without positives.

  Args:
    scores: The score of each example, [n]. Examples with equal scores are one step.
    is_positive: Whether the example has the class, bool [n].
  """
  positives = is_positive.sum()
  if not positives:
    return math.nan
  order = np.argsort(-scores, kind='stable')
  scores, hits = scores[order], np.cumsum(is_positive[order])
  last_of_step = np.append(scores[1:] != scores[:-1], True)
  hits, ranks = hits[last_of_step], np.flatnonzero(last_of_step) + 1
  return float((np.diff(hits, prepend=0) * hits / ranks).sum() / positives)


def average_precisions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Return the average precision of each class [k], from probabilities [n, k] and labels [n, m]."""
  return np.array(
    [
      average_precision(probabilities[:, i], (labels == i).any(axis=1))
      for i in range(probabilities.shape[1])
    ]
  )
