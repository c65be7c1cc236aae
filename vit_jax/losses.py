"""What is minimised. Shapes: b batch, m labels of an example (padded with -1), k classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def multi_hot(labels: jax.Array, classes: int) -> jax.Array:
  """int [b, m] class numbers, padded with -1 -> float32 [b, k] with a 1 for every label."""
  return jax.nn.one_hot(labels, classes).max(axis=1)


def softmax_loss(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy [b] with the softmax; several labels share the probability equally."""
  targets = targets / jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def sigmoid_loss(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy [b] of independent classes, summed over them. Smoothed targets are 1 - s and s, as in the paper's runs."""
  targets = smoothing + (1 - 2 * smoothing) * targets
  return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES: dict[str, Callable] = {'softmax': softmax_loss, 'sigmoid': sigmoid_loss}
