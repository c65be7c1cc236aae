"""Numbers about classes, against scikit-learn and against sorting by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vit_jax.report import classes
from vit_jax.report.classes import MAX_MATRIX_CLASSES, SHOWN_EXAMPLES, summarize_predictions


def draw(classes: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
  """Return labels [n] of unequal classes and probabilities [n, classes]."""
  rng = np.random.default_rng(1)
  labels = np.minimum(rng.geometric(0.3, n) - 1, classes - 2)  # The last class has no examples.
  logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
  return labels, (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def test_rows_and_means_are_those_of_scikit_learn(make_result):
  labels, probabilities = draw(6)
  names = tuple('abcdef')
  summary = summarize_predictions(make_result(labels, probabilities), names, 'softmax')
  predictions = probabilities.argmax(axis=1)
  expected = precision_recall_fscore_support(
    labels, predictions, labels=range(6), zero_division=np.nan
  )
  assert [row[0] for row in summary.rows] == list(names)
  assert [row[4] for row in summary.rows] == expected[3].tolist()
  numbers = np.array([row[1:4] for row in summary.rows[:5]], float)
  np.testing.assert_allclose(numbers, np.stack(expected[:3], axis=1)[:5], atol=1e-12)
  for (name, values), average in zip(summary.means, ('macro', 'weighted'), strict=True):
    means = precision_recall_fscore_support(
      labels, predictions, labels=range(5), average=average, zero_division=0
    )
    assert name == f'{average} mean'
    assert values[:3] == pytest.approx(means[:3])


def test_cells_count_as_scikit_learn_and_show_their_most_confident_examples(make_result):
  labels, probabilities = draw(6)
  summary = summarize_predictions(make_result(labels, probabilities), tuple('abcdef'), 'softmax')
  predictions = probabilities.argmax(axis=1)
  counts = [[cell.count for cell in cells] for _, cells in summary.matrix]
  np.testing.assert_array_equal(counts, confusion_matrix(labels, predictions, labels=range(6)))
  members = [i for i in range(len(labels)) if (labels[i], predictions[i]) == (0, 1)]
  best = sorted(members, key=lambda i: -probabilities[i].max())[:8]
  assert summary.matrix[0][1][1].places == tuple(100 + i for i in best)


def test_mistakes_and_uncertain_examples_are_sorted_by_confidence(make_result):
  labels, probabilities = draw(6)
  summary = summarize_predictions(make_result(labels, probabilities), tuple('abcdef'), 'softmax')
  confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels
  by_confidence = sorted(range(len(labels)), key=lambda i: confidence[i])
  mistakes = [i for i in reversed(by_confidence) if wrong[i]][:SHOWN_EXAMPLES]
  assert [each['place'] - 100 for each in summary.mistakes] == mistakes
  assert [each['place'] - 100 for each in summary.uncertain] == by_confidence[:SHOWN_EXAMPLES]
  first = probabilities[mistakes[0]]
  assert summary.mistakes[0]['guesses'][1] == (
    'abcdef'[np.argsort(-first)[1]],
    pytest.approx(np.sort(first)[-2]),
  )


def test_many_classes_have_a_list_of_their_most_common_confusions(make_result):
  k = MAX_MATRIX_CLASSES + 1
  labels, probabilities = draw(k)
  names = tuple(f'class {i}' for i in range(k))
  summary = summarize_predictions(make_result(labels, probabilities), names, 'softmax')
  counts = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(k))
  np.fill_diagonal(counts, 0)
  assert summary.matrix is None
  assert [cell.count for cell in summary.confusions] == sorted(counts[counts > 0])[::-1][:50]


def test_a_prediction_outside_the_classes_of_the_data_has_a_column(make_result):
  labels, probabilities = draw(6)
  result = make_result(labels, probabilities)
  result.predictions[:7] = -1
  summary = summarize_predictions(result, tuple('abcdef'), 'softmax')
  assert len(summary.predicted_names) == 7
  assert sum(cells[-1].count for _, cells in summary.matrix) == 7


def test_of_many_classes_the_page_lists_those_with_the_lowest_f1(make_result, monkeypatch):
  labels, probabilities = draw(6)
  monkeypatch.setattr(classes, 'MAX_LISTED_CLASSES', 3)
  summary = summarize_predictions(make_result(labels, probabilities), tuple('abcdef'), 'softmax')
  f1 = precision_recall_fscore_support(
    labels, probabilities.argmax(axis=1), labels=range(6), zero_division=np.nan
  )[2]
  worst = sorted(np.argsort(f1)[:3])
  assert summary.classes == 6
  assert [row[0] for row in summary.rows] == ['abcdef'[i] for i in worst]
