"""Evaluation of a split with a pre-trained model, against NumPy in float64 on its logits."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.conftest import NAMES
from vit_jax.data.class_names import match_classes
from vit_jax.data.sources import open_source
from vit_jax.evaluate.classify import (
  ClassificationResult,
  class_table,
  classification_statistics,
  evaluate_split,
)
from vit_jax.evaluate.confusion import confusion_matrix, count_per_class
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.outputs import mean_classification_metrics, mean_masked_patch_metrics
from vit_jax.evaluate.predict import eval_data_config


def evaluate(model, source, batch: int = 16) -> tuple[ClassificationResult, int]:
  """Return the result, and the number of rows that `on_batch` was called with."""
  logit_indices, _ = match_classes(
    source.label_names, model.labels, classes=model.classes, source=model.source
  )
  sizes = []
  data = eval_data_config(model, batch=batch)
  evaluator, params = make_pretrained_evaluator(model, data, on_batch=sizes.append)
  result = evaluate_split(evaluator, params, source, loss=model.loss, logit_indices=logit_indices)
  return result, sum(sizes)


def test_photos_of_a_folder_are_evaluated_upright(make_model, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # A quarter turn.
  rng = np.random.default_rng(0)
  for name in NAMES:
    folder = tmp_path / 'sideways' / 'val' / name
    folder.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / '1.png', exif=exif)
  model, source = make_model(), open_source(f'folder:{tmp_path / "sideways"}', 'val')
  stored = [np.asarray(Image.open(io.BytesIO(source[i][0]))) for i in range(4)]
  upright = [np.rot90(image, -1) for image in stored]
  logits = np.asarray(model.logits(np.stack(upright)), np.float64)
  losses = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
  assert evaluate(model, source)[0].loss == pytest.approx(losses.mean(), abs=1e-5)


@pytest.mark.parametrize('batch', [1, 16, 37])
@pytest.mark.parametrize(
  'labels', [NAMES, NAMES[::-1], ('ant', *NAMES, 'owl')], ids=['same', 'reversed', 'more']
)
def test_accuracy_loss_and_confusion_are_those_of_the_logits(
  make_model, source, by_hand, labels, batch
):
  """Batches are padded to a multiple of eight devices. Padding does not count."""
  model = make_model(labels)
  names, logits = by_hand(model, source)
  true, predicted = np.array([labels.index(name) for (name,) in names]), logits.argmax(axis=1)
  result, rows = evaluate(model, source, batch)
  assert (result.examples, result.skipped) == (37, 0)
  assert rows == -(-37 // round_up(batch)) * round_up(batch)
  assert result.accuracy == np.mean(true == predicted)
  assert result.accuracy_top5 == np.mean(
    [t in row[:5] for t, row in zip(true, np.argsort(-logits, axis=1), strict=True)]
  )
  shifted = logits - logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(37), true]
  assert result.loss == pytest.approx(losses.mean(), abs=1e-5)

  expected = np.zeros((4, 5), int)  # The last column is for classes that the data do not have.
  for (name,), class_ in zip(names, predicted, strict=True):
    expected[NAMES.index(name), NAMES.index(labels[class_]) if labels[class_] in NAMES else 4] += 1
  np.testing.assert_array_equal(confusion_matrix(result.labels, result.predictions, 4), expected)
  seen, right = count_per_class(result.labels, result.predictions, 4)
  assert seen.tolist() == [8, 15, 7, 7]
  assert right.tolist() == np.diag(expected).tolist()


def round_up(batch: int) -> int:
  """Return the next multiple of eight devices."""
  return -(-batch // 8) * 8


@pytest.mark.parametrize('labels', [NAMES, ('ant', *NAMES, 'owl')], ids=['same', 'more'])
def test_a_prediction_of_any_of_several_labels_is_correct(
  tmp_path, make_model, source, by_hand, labels
):
  lines = [
    f'{source[i][2]},{source.label_names[source[i][1][0]]}{";hen" if i % 2 else ""}'
    for i in range(len(source))
  ]
  (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *lines]), encoding='utf-8')
  several = open_source(f'csv:{tmp_path / "labels.csv"}', 'all')
  model = make_model(labels)
  names, logits = by_hand(model, several)
  right = [
    labels[class_] in each for class_, each in zip(logits.argmax(axis=1), names, strict=True)
  ]
  result, _ = evaluate(model, several)
  assert result.accuracy == np.mean(right)
  seen, correct = count_per_class(result.labels, result.predictions, 4)
  for i, name in enumerate(NAMES):
    has = np.array([name in each for each in names])
    assert (seen[i], correct[i]) == (has.sum(), np.sum(has & right))


def test_statistics_of_one_label_equal_scikit_learns(make_model, source, by_hand):
  metrics = pytest.importorskip('sklearn.metrics')
  labels = ('ant', *NAMES, 'owl')
  model = make_model(labels)
  names, logits = by_hand(model, source)
  true, predicted = [name for (name,) in names], [labels[i] for i in logits.argmax(axis=1)]
  result, _ = evaluate(model, source)
  probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
  probabilities /= probabilities.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(result.confidence, probabilities.max(axis=1), rtol=1e-5)
  statistics = classification_statistics(result, model.loss)
  expected = metrics.precision_recall_fscore_support(true, predicted, labels=NAMES, zero_division=0)
  for name, values in zip(('precision', 'recall', 'f1'), expected, strict=False):
    assert statistics[f'macro_{name}'] == pytest.approx(np.mean(values))
  log_loss = metrics.log_loss(true, probabilities, labels=labels)
  assert statistics['log_loss'] == pytest.approx(log_loss, rel=1e-5)
  assert statistics['accuracy_low'] < result.accuracy < statistics['accuracy_high']
  table = class_table(result, NAMES)
  assert list(table) == ['class', 'examples', 'correct', 'accuracy', 'precision', 'f1']
  np.testing.assert_allclose(table['f1'], expected[2])
  np.testing.assert_allclose(np.nan_to_num(table['precision']), expected[0])
  assert 'log_loss' not in classification_statistics(result, 'sigmoid')


@pytest.mark.parametrize('labels', [NAMES, ('ant', *NAMES[::-1], 'owl')], ids=['same', 'more'])
@pytest.mark.parametrize('loss', ['softmax', 'sigmoid'])
def test_mean_average_precision_equals_scikit_learns(
  tmp_path, make_model, source, by_hand, labels, loss
):
  metrics = pytest.importorskip('sklearn.metrics')
  lines = [
    f'{source[i][2]},{source.label_names[source[i][1][0]]}{";hen" if i % 2 else ""}'
    for i in range(len(source))
  ]
  (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *lines]), encoding='utf-8')
  several = open_source(f'csv:{tmp_path / "labels.csv"}', 'all')
  model = dataclasses.replace(make_model(labels), loss=loss)
  names, logits = by_hand(model, several)
  scores = 1 / (1 + np.exp(-logits))
  if loss == 'softmax':
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  expected = [
    metrics.average_precision_score([name in each for each in names], scores[:, labels.index(name)])
    for name in several.label_names
  ]
  result, _ = evaluate(model, several)
  statistics = classification_statistics(result, loss)
  assert statistics['mean_average_precision'] == pytest.approx(np.mean(expected))
  assert 'macro_f1' not in statistics
  table = class_table(result, several.label_names)
  np.testing.assert_allclose(table['average_precision'], expected)


def test_a_sigmoid_model_is_evaluated_with_the_sigmoid_loss(make_model, source, by_hand):
  model = dataclasses.replace(make_model(), loss='sigmoid')
  names, logits = by_hand(model, source)
  target = np.array([[name == each for each in NAMES] for (name,) in names])
  losses = np.log1p(np.exp(np.where(target, -logits, logits))).sum(axis=1)
  assert evaluate(model, source)[0].loss == pytest.approx(losses.mean(), abs=1e-5)


def test_means_are_over_readable_examples_and_sums_are_in_float64():
  """100,000 losses of 0.1 after one of 10,000: a float32 sum would be off in the sixth digit."""
  n = 100_001
  losses = np.full(n, 0.1, np.float32)
  losses[0] = 1e4
  top5 = np.tile(np.array([3, 1, 4, 0, 5], np.int32), (n, 1))
  labels = np.full((n, 2), -1, np.int32)
  labels[:, 0] = 2
  labels[:50_000, 0] = 3  # Correct.
  labels[50_000:75_000, 1] = 5  # In the top 5, as the second label.
  mask = np.ones(n, bool)
  mask[-1] = False
  losses[-1] = np.nan
  rows = {'loss': losses, 'top5': top5, 'label': labels, 'mask': mask}
  metrics = mean_classification_metrics(rows)
  assert list(metrics) == ['accuracy', 'accuracy_top5', 'loss', 'examples']
  assert (metrics['accuracy'], metrics['accuracy_top5']) == (0.5, 0.75)
  assert metrics['examples'] == 100_000
  expected = (1e4 + 99_999 * float(np.float32(0.1))) / 100_000
  assert metrics['loss'] == pytest.approx(expected, rel=1e-12)


def test_masked_accuracy_is_over_the_colors_of_readable_examples():
  rows = {
    'loss': np.array([1.0, 2.0, 40.0], np.float32),
    'correct': np.array([3, 4, 50]),
    'colors': np.array([10, 10, 100]),
    'mask': np.array([True, True, False]),
  }
  metrics = mean_masked_patch_metrics(rows)
  assert metrics == {'masked_accuracy': 0.35, 'loss': 1.5, 'examples': 2}
  del rows['correct'], rows['colors']
  assert mean_masked_patch_metrics(rows) == {'loss': 1.5, 'examples': 2}


def test_without_a_readable_example_the_means_are_zero():
  rows = {
    'loss': np.ones(2, np.float32),
    'top5': np.zeros((2, 5), np.int32),
    'label': np.zeros((2, 1), np.int32),
    'mask': np.zeros(2, bool),
  }
  assert mean_classification_metrics(rows) == {
    'accuracy': 0.0,
    'accuracy_top5': 0.0,
    'loss': 0.0,
    'examples': 0,
  }
