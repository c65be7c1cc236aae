"""What is minimised. Shapes: b batch, m labels of an example (padded with -1), k classes; t colours of a masked patch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import Config


def multi_hot(labels: jax.Array, classes: int) -> jax.Array:
  """int [b, m] class numbers, padded with -1 -> float32 [b, k] with a 1 for every label."""
  return jax.nn.one_hot(labels, classes).max(axis=1)


def labels_to_targets(labels: jax.Array, classes: int) -> jax.Array:
  """What a batch's labels say of each class: float32 [b, k]. Those of a mixture (data/mixture.py) say it themselves."""
  return labels if jnp.issubdtype(labels.dtype, jnp.floating) else multi_hot(labels, classes)


def softmax_loss(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy [b] with the softmax; several labels share the probability equally."""
  targets = targets / jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def sigmoid_loss(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy [b] of independent classes, summed over them. Smoothed targets are 1 - s and s, as in the paper's runs."""
  targets = smoothing + (1 - 2 * smoothing) * targets
  return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


def make_training_loss(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(logits, targets) -> [b], whose mean over the batch is minimised.

  The targets of a mixture are smoothed already, those of them that are to be, and the mean over its batch counts as that over
  the labelled images plus `unlabelled_ratio` times that over the others: google-research/noisystudent's sum.
  """
  loss = LOSSES[config.loss]
  if not config.data.unlabelled:
    return functools.partial(loss, smoothing=config.label_smoothing)
  return lambda logits, targets: (1 + config.data.unlabelled_ratio) * loss(logits, targets)


def color_loss(said: tuple[jax.Array, jax.Array], targets: jax.Array) -> jax.Array:
  """Cross-entropy [b], the mean over the masked patches and their colours, of (logits [b, m, t, 512], int [b, m, t])."""
  del targets  # Of labels.
  return optax.softmax_cross_entropy_with_integer_labels(*said).mean(axis=(1, 2))


def pixel_loss(said: tuple[jax.Array, jax.Array], targets: jax.Array) -> jax.Array:
  """Squared error [b], the mean over the masked patches and their values, of two float [b, m, values]."""
  del targets
  return optax.squared_error(*said).mean(axis=(1, 2))


LOSSES: dict[str, Callable] = {'softmax': softmax_loss, 'sigmoid': sigmoid_loss}
MASK_LOSSES: dict[str, Callable] = {'colour': color_loss, 'grid': color_loss, 'pixels': pixel_loss}
