"""Training losses, per example.

Shapes: b batch, l labels of an example (padded with -1), k classes, m masked patches, t colors of a
patch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import Config, DistillConfig


def multi_hot(labels: jax.Array, classes: int) -> jax.Array:
  """Return float32 [b, k] with a 1 for every class number in `labels` [b, l], padded with -1."""
  return jax.nn.one_hot(labels, classes).max(axis=1)


def labels_to_targets(labels: jax.Array, classes: int) -> jax.Array:
  """Return the targets [b, k] of a batch's labels: class numbers [b, l] or floats [b, k].

  Floats are targets already, as in the mixtures of data/mixture.py.
  """
  return labels if jnp.issubdtype(labels.dtype, jnp.floating) else multi_hot(labels, classes)


def softmax_loss(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Return the softmax cross-entropy [b]; several labels share the probability equally."""
  targets = targets / jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def sigmoid_loss(
  logits: jax.Array,
  targets: jax.Array,
  smoothing: float = 0.0,
  *,
  reduction: str = 'sum',
  threshold: float = 0.0,
) -> jax.Array:
  """Return the cross-entropy [b] of independent classes, a sum or a mean over the classes.

  Smoothed targets are 1 - s and s, as in the runs of the paper. With a threshold, targets are 1
  above it and 0 elsewhere: mixed images then have all their labels in full.
  """
  targets = (targets > threshold).astype(targets.dtype) if threshold else targets
  targets = smoothing + (1 - 2 * smoothing) * targets
  return REDUCTIONS[reduction](optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def make_training_loss(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Return the loss (logits, targets) -> [b], whose mean over the batch is minimized.

  The targets of a mixture of labelled and unlabelled images are already smoothed where smoothing
  applies. The mean over its batch equals the mean over the labelled images plus `unlabelled_ratio`
  times the mean over the others, which is the sum in google-research/noisystudent.
  """
  loss = LOSSES[config.loss]
  if config.loss == 'sigmoid':
    options = {'reduction': config.sigmoid_reduction, 'threshold': config.target_threshold}
    loss = functools.partial(loss, **options)
  if not config.data.unlabelled:
    return functools.partial(loss, smoothing=config.label_smoothing)
  return lambda logits, targets: (1 + config.data.unlabelled_ratio) * loss(logits, targets)


def balanced_class_weights(counts: np.ndarray) -> np.ndarray:
  """Return weights float32 [k] by which every class has the same part of the loss.

  `counts` are the examples of each class. The weights have a mean of 1 over the examples. A class
  without an example has the weight 0.
  """
  used = np.sum(counts > 0)
  return np.where(counts > 0, counts.sum() / (used * np.maximum(counts, 1)), 0).astype(np.float32)


def weight_classes(loss: Callable, weights: np.ndarray) -> Callable:
  """Return `loss` with each example multiplied by the weight of its class.

  Several labels, and mixed images, have the weighted mean of the weights of their classes.
  """

  def weighted(logits: jax.Array, targets: jax.Array) -> jax.Array:
    total = jnp.maximum(targets.sum(axis=-1), 1)
    return loss(logits, targets) * (targets @ weights) / total

  return weighted


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float):
  """Return the Kullback-Leibler divergence [b] of the probabilities from those of the teacher.

  Both logits [b, k] are divided by the temperature. The factor temperature² keeps the size of the
  gradients, as in arXiv 1503.02531 and in big_vision.
  """
  ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(ours, theirs)


def add_teacher(label_loss: Callable, config: DistillConfig) -> Callable:
  """Return the loss (logits, (targets, teacher's logits)) -> [b]: `label_loss` and the divergence.

  With a weight of 1, labels do not count.
  """
  weight, temperature = config.weight, config.temperature

  def loss(logits: jax.Array, targets_and_logits: tuple[jax.Array, jax.Array]) -> jax.Array:
    targets, teacher_logits = targets_and_logits
    divergence = distillation_loss(logits, teacher_logits, temperature)
    if weight == 1:
      return divergence
    return weight * divergence + (1 - weight) * label_loss(logits, targets)

  return loss


def color_loss(predictions: tuple[jax.Array, jax.Array], targets: jax.Array) -> jax.Array:
  """Return the cross-entropy [b] of the colors of masked patches, averaged over patches and colors.

  Args:
    predictions: Logits [b, m, t, 512] and true color classes, int [b, m, t].
    targets: Ignored; the targets that come from labels.
  """
  del targets
  return optax.softmax_cross_entropy_with_integer_labels(*predictions).mean(axis=(1, 2))


def pixel_loss(predictions: tuple[jax.Array, jax.Array], targets: jax.Array) -> jax.Array:
  """Return the squared error [b] of the pixels of masked patches, averaged over patches and values.

  Args:
    predictions: Predicted and true pixels, two float [b, m, values].
    targets: Ignored; the targets that come from labels.
  """
  del targets
  return optax.squared_error(*predictions).mean(axis=(1, 2))


REDUCTIONS = {'sum': jnp.sum, 'mean': jnp.mean}
LOSSES: dict[str, Callable] = {'softmax': softmax_loss, 'sigmoid': sigmoid_loss}
MASK_LOSSES: dict[str, Callable] = {'colour': color_loss, 'grid': color_loss, 'pixels': pixel_loss}
