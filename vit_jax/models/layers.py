"""Layers that several model families share.

Shapes: b batch, h w patch grid or feature map, n tokens, d width, c channels, k classes.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig

BATCH_NORM_EPSILON = 1e-3  # EfficientNet's in TensorFlow.
RUNNING_STATISTICS = ('running_mean', 'running_var')  # No other parameter has these names.
BLOCKS = ('Transformer', 'encoderblock')  # The path of the stacked encoder blocks.
BLOCK_PATH_PREFIX = '/'.join(BLOCKS) + '/'
NORMS = {'layernorm': nn.LayerNorm, 'rmsnorm': nn.RMSNorm}


def normalize_images(images: jax.Array, config: ModelConfig) -> jax.Array:
  """Return (images - mean) / scale in the dtype of the model.

  Args:
    images: [b, h, w, 3] with values from 0 to 255, uint8 or float.
    config: Supplies `mean` and `scale`, both in units of uint8, and `dtype`.
  """
  mean, scale = jnp.array(config.mean), jnp.array(config.scale)
  return ((images.astype(jnp.float32) - mean) / scale).astype(config.dtype)


def apply_head(features: jax.Array, classes: int, config: ModelConfig) -> jax.Array:
  """Map features [b, d] to float32 logits [b, k] with a linear layer named `head`.

  Call it inside a compact module, which then owns head/kernel (initially zero) and head/bias.
  """
  # In float32: near a head bias of -10, bfloat16 has steps of 1/16.
  return nn.Dense(
    classes,
    dtype=jnp.float32,
    kernel_init=nn.initializers.zeros,
    bias_init=nn.initializers.constant(config.head_bias),
    name='head',
  )(features)


def norm_factory(config: ModelConfig) -> Callable[..., nn.Module]:
  """Return the class of the model's norms, with its epsilon and dtype."""
  return functools.partial(
    NORMS[config.norm], epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype)
  )


class BatchNorm(nn.Module):
  """Batch normalization of [b, h, w, c], with running statistics stored as parameters.

  Training normalizes by the moments over (b, h, w) of all devices. It also sows the collection
  'drift', a scalar to be added to the loss: its gradient moves the running statistics towards the
  batch's. Evaluation normalizes by the running statistics, and sows nothing.

  Statistics are in float32. Examples that the batch's mask excludes count in them.
  """

  dtype: jnp.dtype
  epsilon: float = BATCH_NORM_EPSILON

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    param = lambda name, init: self.param(name, init, x.shape[-1:])
    scale, bias = param('scale', nn.initializers.ones), param('bias', nn.initializers.zeros)
    running_mean = param('running_mean', nn.initializers.zeros)
    running_var = param('running_var', nn.initializers.ones)
    mean, var = running_mean, running_var
    if train:
      mean, var = batch_moments(x)
      drift = jnp.sum((running_mean - jax.lax.stop_gradient(mean)) ** 2)
      drift += jnp.sum((running_var - jax.lax.stop_gradient(var)) ** 2)
      self.sow('drift', 'drift', drift / 2)
    x = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
    return x.astype(self.dtype)


def batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the mean [c] and variance [c] of x [b, h, w, c], averaged over devices inside shard_map.

  Both are float32. Outside shard_map, `x` is already the batch of all devices.
  """
  x = x.astype(jnp.float32)
  mean, square = x.mean(axis=(0, 1, 2)), (x * x).mean(axis=(0, 1, 2))
  if axes := jax.sharding.get_abstract_mesh().manual_axes:
    mean, square = jax.lax.pmean((mean, square), tuple(axes))
  return mean, jnp.maximum(square - mean * mean, 0)


def trainable_leaves(tree: dict) -> list[jax.Array]:
  """Return the leaves of a parameter tree, or of its gradients, without running statistics."""
  leaves = jax.tree.leaves_with_path(tree)
  return [leaf for keys, leaf in leaves if keys[-1].key not in RUNNING_STATISTICS]


class Dropout(nn.Module):
  """Dropout with the random stream 'dropout'; the identity if `deterministic` or `rate` is 0.

  Instances have no explicit name, and Flax folds the automatic one, `Dropout_0`, into the random
  key. Renaming this class would change every mask, so an interrupted run would not resume exactly.
  """

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.deterministic or not self.rate:
      return x
    return apply_dropout(x, self.make_rng('dropout'), rate=self.rate)


def apply_dropout(x: jax.Array, key: jax.Array, *, rate: float) -> jax.Array:
  """Zero a fraction `rate` of the elements of `x` and scale the others by 1 / (1 - rate).

  The backward pass draws the mask again from `key`, so no mask is kept in memory.
  """

  def drop(key, x):
    kept = jax.random.bits(key, x.shape, jnp.uint32) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)

  return jax.custom_derivatives.linear_call(drop, drop, key, x)


def apply_drop_path(branch: jax.Array, key: jax.Array, rate: jax.Array | float) -> jax.Array:
  """Apply stochastic depth (arXiv 1603.09382) to a residual branch [b, …].

  A fraction `rate` of the images gets zeros; the others are scaled by 1 / (1 - rate).
  """
  kept = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], *[1] * (branch.ndim - 1)))
  return jnp.where(kept, branch / jnp.asarray(1 - rate, branch.dtype), 0)
