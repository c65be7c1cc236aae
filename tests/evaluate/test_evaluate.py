"""A whole split through a pre-trained model, against NumPy on its logits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.evaluate.conftest import NAMES
from vit_jax.data.class_names import match_classes
from vit_jax.data.sources import open_source
from vit_jax.evaluate.classify import evaluate_split
from vit_jax.evaluate.confusion import confusion_matrix, count_per_class
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.optim.losses import LOSSES
from vit_jax.step import predict_logits


def run(model, source, batch: int = 16):
  """The Evaluation, and how many images its progress told of."""
  columns, _ = match_classes(
    source.label_names, model.labels, classes=model.classes, source=model.source
  )
  told = []
  result = evaluate_split(
    model.params,
    source,
    eval_data_config(model, batch=batch),
    predict=functools.partial(predict_logits, model=model.model),
    loss=LOSSES[model.loss],
    columns=columns,
    progress=told.append,
  )
  return result, sum(told)


@pytest.mark.parametrize('batch', [1, 16, 37])
@pytest.mark.parametrize(
  'labels', [NAMES, NAMES[::-1], ('ant', *NAMES, 'owl')], ids=['same', 'reversed', 'more']
)
def test_accuracy_loss_and_confusion_are_those_of_the_logits(
  make_model, source, by_hand, labels, batch
):
  """A batch that does not divide over the eight devices is filled up, and the last batch too; neither counts."""
  model = make_model(labels)
  names, logits = by_hand(model, source)
  true, predicted = np.array([labels.index(name) for (name,) in names]), logits.argmax(axis=1)
  result, told = run(model, source, batch)
  assert (result.examples, result.skipped) == (37, 0)
  assert told == -(-37 // told_at(batch)) * told_at(batch)
  assert result.accuracy == np.mean(true == predicted)
  assert result.accuracy_top5 == np.mean(
    [t in row[:5] for t, row in zip(true, np.argsort(-logits, axis=1), strict=True)]
  )
  shifted = logits - logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(37), true]
  assert result.loss == pytest.approx(losses.mean(), abs=1e-5)

  expected = np.zeros(
    (4, 5), int
  )  # By the data's classes; the last column is for those that it has not.
  for (name,), class_ in zip(names, predicted, strict=True):
    expected[NAMES.index(name), NAMES.index(labels[class_]) if labels[class_] in NAMES else 4] += 1
  np.testing.assert_array_equal(confusion_matrix(result.labels, result.predicted, 4), expected)
  seen, right = count_per_class(result.labels, result.predicted, 4)
  assert seen.tolist() == [8, 15, 7, 7]
  assert right.tolist() == np.diag(expected).tolist()


def test_kernels_are_told_the_mesh_that_a_batch_is_split_over(make_model, source):
  model, seen = make_model(NAMES), []

  def looking(params, images):
    seen.append(jax.sharding.get_abstract_mesh().size)
    return predict_logits(params, images, model=model.model)

  columns, _ = match_classes(
    source.label_names, model.labels, classes=model.classes, source=model.source
  )
  data = eval_data_config(model, batch=16)
  evaluate_split(
    model.params,
    source,
    data,
    predict=looking,
    loss=LOSSES[model.loss],
    columns=columns,
    progress=lambda count: None,
  )
  assert seen == [8]


def told_at(batch: int) -> int:
  """The batch that divides over eight devices."""
  return -(-batch // 8) * 8


@pytest.mark.parametrize('labels', [NAMES, ('ant', *NAMES, 'owl')], ids=['same', 'more'])
def test_any_of_several_labels_is_right(tmp_path, make_model, source, by_hand, labels):
  lines = [
    f'{source[i][2]},{source.label_names[source[i][1][0]]}{";hen" if i % 2 else ""}'
    for i in range(len(source))
  ]
  (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *lines]))
  several = open_source(f'csv:{tmp_path / "labels.csv"}', 'all')
  model = make_model(labels)
  names, logits = by_hand(model, several)
  right = [
    labels[class_] in each for class_, each in zip(logits.argmax(axis=1), names, strict=True)
  ]
  result, _ = run(model, several)
  assert result.accuracy == np.mean(right)
  seen, correct = count_per_class(result.labels, result.predicted, 4)
  for i, name in enumerate(NAMES):
    has = np.array([name in each for each in names])
    assert (seen[i], correct[i]) == (has.sum(), np.sum(has & right))


def test_a_sigmoid_model_is_measured_by_its_own_loss(make_model, source, by_hand):
  model = dataclasses.replace(make_model(), loss='sigmoid')
  names, logits = by_hand(model, source)
  target = np.array([[name == each for each in NAMES] for (name,) in names])
  losses = np.log1p(np.exp(np.where(target, -logits, logits))).sum(axis=1)
  assert run(model, source)[0].loss == pytest.approx(losses.mean(), abs=1e-5)
