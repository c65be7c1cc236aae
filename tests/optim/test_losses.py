"""Tests of the losses against sums over classes in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from vit_jax.config import Config, DataConfig, DistillConfig
from vit_jax.optim.losses import (
  LOSSES,
  add_teacher,
  balanced_class_weights,
  color_loss,
  distillation_loss,
  labels_to_targets,
  make_training_loss,
  multi_hot,
  pixel_loss,
  sigmoid_loss,
  softmax_loss,
  weight_classes,
)

LOGITS = 4 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([[0, -1, -1], [4, 1, -1], [2, 3, 0], [1, -1, -1], [3, 3, -1], [-1, -1, -1]])
TARGETS = np.zeros((6, 5))
for i, row in enumerate(LABELS):
  TARGETS[i, row[row >= 0]] = 1


def cross_entropy(logits, targets):
  """Return -Σ targets · log softmax(logits), in float64."""
  x = logits.astype(np.float64)
  return -np.sum(targets * (x - np.log(np.exp(x).sum(axis=1, keepdims=True))), axis=1)


def binary_cross_entropy(logits, targets):
  """Return -Σ targets · log p + (1 - targets) · log (1 - p), p = sigmoid(logits), in float64."""
  p = 1 / (1 + np.exp(-logits.astype(np.float64)))
  return -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=1)


def test_multi_hot_ignores_padding():
  hot = multi_hot(LABELS, 5)
  np.testing.assert_array_equal(hot, TARGETS)
  assert hot.dtype == np.float32


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_softmax_loss_shares_the_probability_among_the_labels(smoothing):
  shares = TARGETS / np.maximum(TARGETS.sum(axis=1, keepdims=True), 1)
  expected = cross_entropy(LOGITS, (1 - smoothing) * shares + smoothing / 5)
  loss = softmax_loss(LOGITS, TARGETS, smoothing)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 1e-4, 0.1])
def test_sigmoid_loss_is_summed_over_the_classes_and_smoothed_as_in_the_paper(smoothing):
  expected = binary_cross_entropy(LOGITS, np.where(TARGETS == 1, 1 - smoothing, smoothing))
  loss = sigmoid_loss(LOGITS, TARGETS, smoothing)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


def test_losses_are_linear_in_mixed_targets():
  first, second = np.eye(5)[[0, 1, 2, 3, 4, 0]], np.eye(5)[[1, 2, 0, 4, 3, 2]]
  for loss in LOSSES.values():
    mixed = loss(LOGITS, 0.7 * first + 0.3 * second)
    expected = 0.7 * loss(LOGITS, first) + 0.3 * loss(LOGITS, second)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_an_initial_sigmoid_head_with_a_bias_of_minus_10_has_a_small_loss():
  # 10 for the label, and log(1 + e^-10) for each of the 21,843 classes.
  logits, targets = np.full((1, 21_843), -10, np.float32), np.zeros((1, 21_843), np.float32)
  targets[0, 7] = 1
  expected = 10 + 21_843 * np.log1p(np.exp(-10))
  assert sigmoid_loss(logits, targets)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('name', LOSSES)
def test_large_logits_give_finite_losses_and_gradients(name):
  logits = np.array([[500, -500, 0, 0, 1]], np.float32)
  targets = np.eye(5)[1:2]
  value, grad = jax.value_and_grad(lambda x: LOSSES[name](x, targets, 0.1).sum())(logits)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))
  # For softmax, each class's share of the target times the distance of its logit from 500.
  softmax = 0.92 * 1000 + 0.02 * (500 + 500 + 499)
  sigmoid = 2 * 0.9 * 500 + 2 * np.log(2)
  sigmoid += 0.1 * np.log1p(np.exp(-1)) + 0.9 * np.log1p(np.exp(1))
  assert value == pytest.approx({'softmax': softmax, 'sigmoid': sigmoid}[name], rel=1e-5)


def test_float_labels_are_used_as_targets():
  soft = jax.nn.softmax(jnp.asarray(LOGITS[::-1]))
  assert labels_to_targets(soft, 5) is soft
  np.testing.assert_allclose(softmax_loss(LOGITS, soft), cross_entropy(LOGITS, soft), rtol=1e-5)
  np.testing.assert_array_equal(labels_to_targets(LABELS, 5), TARGETS)


def test_a_mixtures_loss_is_the_labelled_mean_plus_the_ratio_times_the_unlabelled_mean():
  """google-research/noisystudent divides the sum over both by the number of labelled images."""
  config = Config(data=DataConfig(unlabelled='images:x', unlabelled_ratio=2), label_smoothing=0.1)
  soft = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS[::-1])))
  each = optax.softmax_cross_entropy(LOGITS, soft)  # Targets of a mixture are not smoothed again.
  expected = each[:2].mean() + 2 * each[2:].mean()
  np.testing.assert_allclose(make_training_loss(config)(LOGITS, soft).mean(), expected, rtol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_the_distillation_loss_is_the_divergence_of_softened_probabilities(temperature):
  teacher = LOGITS[::-1] - 1
  ours, theirs = (
    np.exp(x / temperature) / np.exp(x / temperature).sum(axis=1, keepdims=True)
    for x in (LOGITS.astype(np.float64), teacher.astype(np.float64))
  )
  expected = temperature**2 * np.sum(theirs * np.log(theirs / ours), axis=1)
  loss = distillation_loss(LOGITS, teacher, temperature)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert np.all(np.abs(distillation_loss(LOGITS, LOGITS, temperature)) < 1e-6)
  labelled = add_teacher(softmax_loss, DistillConfig(temperature=temperature, weight=0.3))
  both = 0.3 * expected + 0.7 * softmax_loss(LOGITS, np.eye(5)[[0] * 6])
  np.testing.assert_allclose(labelled(LOGITS, (np.eye(5)[[0] * 6], teacher)), both, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize('temperature', [0.5, 1.0, 10.0])
def test_the_distillation_loss_and_its_gradient_are_those_of_pytorch(temperature):
  torch = pytest.importorskip('torch')
  teacher = 3 * np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)
  x, y = torch.tensor(LOGITS, requires_grad=True), torch.tensor(teacher)
  soft = [torch.nn.functional.log_softmax(each / temperature, dim=1) for each in (x, y)]
  divergence = torch.nn.functional.kl_div(*soft, reduction='none', log_target=True).sum(dim=1)
  (temperature**2 * divergence).sum().backward()
  value, gradient = jax.value_and_grad(
    lambda logits: distillation_loss(logits, teacher, temperature).sum()
  )(LOGITS)
  expected = temperature**2 * divergence.detach().numpy()
  np.testing.assert_allclose(distillation_loss(LOGITS, teacher, temperature), expected, rtol=2e-5)
  assert value == pytest.approx(expected.sum(), rel=1e-5)
  np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_color_and_pixel_losses_are_means_over_patches_and_values():
  rng = np.random.default_rng(3)
  logits, colors = rng.normal(size=(2, 3, 4, 512)), rng.integers(0, 512, (2, 3, 4))
  log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = [
    -np.mean([log_probs[b, m, t, colors[b, m, t]] for m in range(3) for t in range(4)])
    for b in range(2)
  ]
  np.testing.assert_allclose(color_loss((logits, colors), None), expected, rtol=1e-5)
  actual, target = rng.normal(size=(2, 2, 3, 5))
  expected = [((actual[b] - target[b]) ** 2).mean() for b in range(2)]
  np.testing.assert_allclose(pixel_loss((actual, target), None), expected, rtol=1e-5)


def test_balanced_weights_are_those_of_scikit_learn():
  labels = np.repeat([0, 2, 3], [5, 20, 75])  # Class 1 has no example.
  weights = balanced_class_weights(np.bincount(labels, minlength=4))
  expected = compute_class_weight('balanced', classes=np.array([0, 2, 3]), y=labels)
  np.testing.assert_allclose(weights, np.insert(expected, 1, 0), rtol=1e-6)
  assert np.mean(weights[labels]) == pytest.approx(1)


def test_the_weighted_loss_is_that_of_scikit_learn_with_sample_weights():
  rng = np.random.default_rng(1)
  labels, logits = rng.integers(0, 5, 40), rng.normal(size=(40, 5)).astype(np.float32)
  weights = np.array([0.5, 2.0, 1.0, 0.1, 3.0], np.float32)
  losses = weight_classes(softmax_loss, weights)(logits, np.eye(5, dtype=np.float32)[labels])
  probabilities = np.exp(logits.astype(np.float64))
  probabilities /= probabilities.sum(axis=1, keepdims=True)
  expected = log_loss(labels, probabilities, sample_weight=weights[labels], normalize=False)
  assert float(np.sum(losses)) == pytest.approx(expected, rel=1e-5)


def test_a_mixed_image_has_the_mean_weight_of_its_classes():
  weights = np.array([1.0, 3.0], np.float32)
  targets = np.array([[0.75, 0.25], [1, 1], [0, 0]], np.float32)  # Mixed, two labels, none.
  losses = weight_classes(lambda logits, targets: jnp.ones(3), weights)(targets, targets)
  np.testing.assert_allclose(losses, [0.75 * 1 + 0.25 * 3, 2, 0], rtol=1e-6)


@pytest.mark.parametrize('threshold', [None, 0.2])
def test_the_mean_over_classes_with_a_threshold_is_timms_binary_cross_entropy(timm, threshold):
  import torch
  from timm.loss import BinaryCrossEntropy

  del timm  # Lets torchvision be imported, which timm does.
  mixed = (0.7 * TARGETS + 0.3 * TARGETS[::-1]).astype(np.float32)
  theirs = BinaryCrossEntropy(0.0, target_threshold=threshold)
  expected = theirs(torch.tensor(LOGITS), torch.tensor(mixed)).item()
  settings = {'sigmoid_reduction': 'mean', 'target_threshold': threshold or 0.0}
  loss = make_training_loss(Config(loss='sigmoid', **settings))
  assert float(loss(LOGITS, mixed).mean()) == pytest.approx(expected, rel=1e-5)


def test_the_smallest_threshold_makes_every_mixed_label_a_full_one():
  """DeiT III's BCE: targets are mixed > 0."""
  mixed = np.float32([[0.999, 0.001, 0.0]])
  logits = np.float32([[1.0, -2.0, 3.0]])
  loss = sigmoid_loss(logits, mixed, reduction='mean', threshold=1e-6)
  np.testing.assert_allclose(
    loss, binary_cross_entropy(logits, np.array([[1.0, 1.0, 0.0]])) / 3, rtol=1e-5
  )
