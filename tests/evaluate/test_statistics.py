"""Statistics of a classifier, against scikit-learn and numbers computed by hand."""

import math

import numpy as np
import pytest

from vit_jax.evaluate.statistics import (
  average_precision,
  average_precisions,
  calibration_curve,
  class_statistics,
  expected_calibration_error,
  summarize_classes,
  wilson_interval,
)

metrics = pytest.importorskip('sklearn.metrics')


@pytest.mark.parametrize(
  ('correct', 'examples', 'expected'),
  [
    (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, table I, method 3.
    (15, 148, (0.0624, 0.1605)),
    (0, 20, (0.0, 0.1611)),
    (1, 29, (0.0061, 0.1718)),
    (29, 29, (0.8830, 1.0)),
  ],
)
def test_wilsons_interval_equals_published_examples(correct, examples, expected):
  assert wilson_interval(correct, examples) == pytest.approx(expected, abs=5e-5)


def test_without_examples_any_accuracy_is_possible():
  assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize('seed', range(5))
def test_precision_recall_and_f1_equal_scikit_learns(seed):
  """Class 5 is never predicted, class 6 has no examples, and -1 is no class of the data."""
  rng = np.random.default_rng(seed)
  labels = rng.choice([0, 1, 2, 3, 4, 5], 300, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
  wrong = rng.choice([-1, 0, 1, 2, 3, 4, 6], 300)
  predictions = np.where((rng.random(300) < 0.6) & (labels != 5), labels, wrong)
  ours = class_statistics(labels[:, None], predictions, 7)
  theirs = metrics.precision_recall_fscore_support(
    labels, predictions, labels=range(7), zero_division=0
  )
  for values, expected in zip((ours.precision, ours.recall, ours.f1), theirs[:3], strict=True):
    np.testing.assert_allclose(np.nan_to_num(values), expected, rtol=1e-12)
  np.testing.assert_array_equal(ours.examples, theirs[3])
  assert math.isnan(ours.precision[5]) and math.isnan(ours.recall[6]) and ours.f1[6] == 0
  summary = summarize_classes(ours)
  for average in ('macro', 'weighted'):
    expected = metrics.f1_score(
      labels, predictions, labels=range(6), average=average, zero_division=0
    )
    assert summary[f'{average}_f1'] == pytest.approx(expected, rel=1e-12)


def test_classes_without_examples_do_not_count_in_the_macro_means():
  statistics = class_statistics(np.array([[0], [0], [2]]), np.array([0, 1, 2]), 4)
  # Precision 1, 0 of class 1 does not count, 1. Recall 1/2, 1. F1 2/3, 1.
  assert summarize_classes(statistics) == pytest.approx(
    {'macro_precision': 1, 'macro_recall': 3 / 4, 'macro_f1': 5 / 6, 'weighted_f1': 7 / 9}
  )
  assert summarize_classes(class_statistics(np.zeros((0, 1), int), np.zeros(0, int), 4)) == {}


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
  """Two bins: 0.3 with accuracy 1/2 (gap 0.2), and 0.9 with accuracy 3/4 (gap 0.15)."""
  confidence = np.array([0.3] * 2 + [0.9] * 4)
  correct = np.array([True, False, True, True, True, False])
  assert expected_calibration_error(confidence, correct) == pytest.approx(
    (2 * 0.2 + 4 * 0.15) / 6, rel=1e-12
  )
  examples, mean_confidence, accuracy = calibration_curve(confidence, correct, 10)
  assert examples.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 4, 0]
  assert (mean_confidence[8], accuracy[8]) == pytest.approx((0.9, 0.75))


def test_confidences_of_zero_and_one_belong_to_the_first_and_last_bin():
  examples, _, _ = calibration_curve(np.array([0.0, 1.0, 0.5, 0.5000001]), np.ones(4, bool), 2)
  assert examples.tolist() == [2, 2]


@pytest.mark.parametrize('digits', [1, 6], ids=['many ties', 'no ties'])
def test_average_precision_equals_scikit_learns(digits):
  rng = np.random.default_rng(0)
  labels = np.where(rng.random((200, 3)) < 0.4, rng.integers(0, 4, (200, 3)), -1)
  probabilities = rng.random((200, 5)).round(digits)
  ours = average_precisions(probabilities, labels)
  for i in range(4):
    expected = metrics.average_precision_score((labels == i).any(axis=1), probabilities[:, i])
    assert ours[i] == pytest.approx(expected, rel=1e-12)
  assert math.isnan(ours[4])  # No example has class 4.


def test_a_perfect_ranking_has_an_average_precision_of_one():
  assert average_precision(np.array([0.1, 0.9, 0.8]), np.array([False, True, True])) == 1
