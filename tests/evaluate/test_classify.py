"""Exact evaluation, against NumPy."""

import functools

import jax
import numpy as np
import pytest

from vit_jax.evaluate.classify import classify, count
from vit_jax.optim.losses import softmax_loss
from vit_jax.sharding.mesh import make_mesh, to_global

K = 12
LOGITS = lambda params, images: images.reshape(len(images), -1)[:, :K] * params


def padded(rows: dict, batch: int):
  """The rows in batches of one size; the last is filled up with rows that the mask takes out."""
  n = len(rows['label'])
  for start in range(0, n, batch):
    part = {name: value[start : start + batch] for name, value in rows.items()}
    fill = batch - len(part['label'])
    part = {
      name: np.concatenate([value, np.full_like(rows[name][:1].repeat(fill, 0), 7)])
      for name, value in part.items()
    }
    yield part | {'mask': np.arange(batch) < batch - fill}


COUNTS = jax.jit(functools.partial(count, predict=LOGITS, loss=softmax_loss))


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(
  'sizes', [range(1, 35), [63, 64, 65, 100, 101, 127, 128, 129, 199, 200]], ids=['small', 'large']
)
def test_every_example_counts_once_for_sizes_that_do_not_divide(sizes, devices):
  for examples in sizes:
    assert_exact(examples, devices)


def assert_exact(examples: int, devices: int):
  """Accuracy, loss and count over so many examples in batches of 16, against NumPy. On eight devices, of fewer than 15 of the
  last batch some have none."""
  rng = np.random.default_rng(examples)
  rows = {
    'image': rng.normal(size=(examples, 3, 2, 2)).astype(np.float32),
    'label': rng.integers(0, K, (examples, 1)).astype(np.int32),
  }
  mesh = make_mesh(1, batches={})
  place = (lambda batch: to_global(batch, mesh)) if devices == 8 else (lambda batch: batch)
  result = classify(COUNTS(np.float32(2), place(batch)) for batch in padded(rows, 16))

  logits = 2 * rows['image'].reshape(examples, -1).astype(np.float64)
  order, label = np.argsort(-logits, axis=1), rows['label']
  log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  assert result['examples'] == examples
  assert result['accuracy'] == np.mean(order[:, 0] == label[:, 0])
  assert result['accuracy_top5'] == np.mean((order[:, :5] == label).any(1))
  np.testing.assert_allclose(
    result['loss'], -np.mean(np.take_along_axis(log_probabilities, label, 1)), rtol=1e-6
  )


def test_a_prediction_among_several_labels_is_right():
  images = np.eye(K, dtype=np.float32)[[0, 1, 2]].reshape(3, 1, 1, K)
  batch = {
    'image': images,
    'label': np.array([[3, 0], [2, -1], [5, 4]], np.int32),
    'mask': np.ones(3, bool),
  }
  result = classify([count(np.float32(1), batch, predict=LOGITS, loss=softmax_loss)])
  assert result['accuracy'] == 1 / 3


def test_with_fewer_than_five_classes_every_class_is_in_the_top():
  batch = {
    'image': np.zeros((2, 1, 1, 3), np.float32),
    'label': np.array([[0], [2]], np.int32),
    'mask': np.ones(2, bool),
  }
  assert (
    classify([count(np.float32(1), batch, predict=LOGITS, loss=softmax_loss)])['accuracy_top5'] == 1
  )
