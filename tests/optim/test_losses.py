"""The losses against their sums over classes, in NumPy and double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import Config, DataConfig
from vit_jax.optim.losses import (
  LOSSES,
  labels_to_targets,
  make_training_loss,
  multi_hot,
  sigmoid_loss,
  softmax_loss,
)

LOGITS = 4 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([[0, -1, -1], [4, 1, -1], [2, 3, 0], [1, -1, -1], [3, 3, -1], [-1, -1, -1]])
TARGETS = np.zeros((6, 5))
for i, row in enumerate(LABELS):
  TARGETS[i, row[row >= 0]] = 1


def cross_entropy(logits, targets):
  """-Σ targets · log softmax(logits), in float64."""
  x = logits.astype(np.float64)
  return -np.sum(targets * (x - np.log(np.exp(x).sum(axis=1, keepdims=True))), axis=1)


def binary_cross_entropy(logits, targets):
  """-Σ targets · log p + (1 - targets) · log (1 - p) over the classes, p = sigmoid(logits), in float64."""
  p = 1 / (1 + np.exp(-logits.astype(np.float64)))
  return -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=1)


def test_labels_become_ones_and_padding_becomes_nothing():
  hot = multi_hot(LABELS, 5)
  np.testing.assert_array_equal(hot, TARGETS)
  assert hot.dtype == np.float32


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_softmax_loss_shares_the_probability_among_the_labels(smoothing):
  shares = TARGETS / np.maximum(TARGETS.sum(axis=1, keepdims=True), 1)
  expected = cross_entropy(LOGITS, (1 - smoothing) * shares + smoothing / 5)
  np.testing.assert_allclose(
    softmax_loss(LOGITS, TARGETS, smoothing), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('smoothing', [0.0, 1e-4, 0.1])
def test_sigmoid_loss_is_summed_over_the_classes_and_smoothed_as_in_the_paper(smoothing):
  expected = binary_cross_entropy(LOGITS, np.where(TARGETS == 1, 1 - smoothing, smoothing))
  np.testing.assert_allclose(
    sigmoid_loss(LOGITS, TARGETS, smoothing), expected, rtol=1e-5, atol=1e-5
  )


def test_mixed_targets_give_the_mixture_of_the_losses():
  first, second = np.eye(5)[[0, 1, 2, 3, 4, 0]], np.eye(5)[[1, 2, 0, 4, 3, 2]]
  for loss in LOSSES.values():
    mixed = loss(LOGITS, 0.7 * first + 0.3 * second)
    np.testing.assert_allclose(
      mixed, 0.7 * loss(LOGITS, first) + 0.3 * loss(LOGITS, second), rtol=1e-5
    )


def test_a_fresh_sigmoid_head_with_many_classes_starts_near_the_entropy_of_its_labels():
  # 21,843 logits at the bias of -10: 10 for the label, and log(1 + e^-10) for each of the others.
  logits, targets = np.full((1, 21_843), -10, np.float32), np.zeros((1, 21_843), np.float32)
  targets[0, 7] = 1
  assert sigmoid_loss(logits, targets)[0] == pytest.approx(
    10 + 21_843 * np.log1p(np.exp(-10)), rel=1e-5
  )


@pytest.mark.parametrize('name', LOSSES)
def test_large_logits_give_finite_losses_and_gradients(name):
  logits = np.array([[500, -500, 0, 0, 1]], np.float32)
  targets = np.eye(5)[1:2]
  value, grad = jax.value_and_grad(lambda x: LOSSES[name](x, targets, 0.1).sum())(logits)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))
  by_hand = {
    'softmax': 0.92 * 1000
    + 0.02 * (500 + 500 + 499),  # Each class's share of the target times its distance from 500.
    'sigmoid': 0.9 * 500
    + 0.9 * 500
    + 2 * np.log(2)
    + 0.1 * np.log1p(np.exp(-1))
    + 0.9 * np.log1p(np.exp(1)),
  }
  assert value == pytest.approx(by_hand[name], rel=1e-5)


def test_soft_labels_are_the_targets_themselves():
  soft = jax.nn.softmax(jnp.asarray(LOGITS[::-1]))
  assert labels_to_targets(soft, 5) is soft
  np.testing.assert_allclose(
    softmax_loss(LOGITS, soft), optax.softmax_cross_entropy(LOGITS, soft), rtol=1e-6
  )
  np.testing.assert_array_equal(labels_to_targets(LABELS, 5), TARGETS)


def test_the_mean_over_a_mixture_is_that_of_the_labelled_and_the_ratio_times_that_of_the_others():
  """google-research/noisystudent adds up both kinds, and divides by the number of the labelled ones."""
  config = Config(data=DataConfig(unlabelled='images:x', unlabelled_ratio=2), label_smoothing=0.1)
  soft = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS[::-1])))
  each = optax.softmax_cross_entropy(LOGITS, soft)  # Smoothed before, if at all.
  expected = each[:2].mean() + 2 * each[2:].mean()
  np.testing.assert_allclose(make_training_loss(config)(LOGITS, soft).mean(), expected, rtol=1e-6)
