"""TODO."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig


class Dropout(nn.Module):
  """Sets a share `rate` of the elements to 0 and scales up the others, with a key of the stream 'dropout'."""

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.deterministic or not self.rate:
      return x
    return apply_dropout(x, self.make_rng('dropout'), rate=self.rate)


def apply_drop_path(branch: jax.Array, key: jax.Array, rate: jax.Array | float) -> jax.Array:
  """The branch [b, …], zero for a share `rate` of the images and scaled up for the others (arXiv 1603.09382)."""
  kept = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], *[1] * (branch.ndim - 1)))
  return jnp.where(kept, branch / jnp.asarray(1 - rate, branch.dtype), 0)


def apply_dropout(x: jax.Array, key: jax.Array, *, rate: float) -> jax.Array:
  """`x`, or its gradient, with the mask that `key` draws."""

  def drop(key, x):
    kept = jax.random.bits(key, x.shape, jnp.uint32) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)

  return jax.custom_derivatives.linear_call(drop, drop, key, x)


BATCH_NORM_EPSILON = 1e-3  # EfficientNet's.


RUNNING_STATISTICS = ('running_mean', 'running_var')  # What no other parameter is called.


class BatchNorm(nn.Module):
  """[b, h, w, c] with mean 0 and deviation 1 over (b, h, w) of all devices in training, by running statistics otherwise.

  Sows 'drift': the loss, a scalar. Statistics are in float32; an image that the batch's mask leaves out counts in them.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    param = lambda name, init: self.param(name, init, x.shape[-1:])
    scale, bias = param('scale', nn.initializers.ones), param('bias', nn.initializers.zeros)
    running = (
      param('running_mean', nn.initializers.zeros),
      param('running_var', nn.initializers.ones),
    )
    mean, var = batch_moments(x) if train else running
    if train:
      drift = sum(
        jnp.sum((a - jax.lax.stop_gradient(b)) ** 2)
        for a, b in zip(running, (mean, var), strict=True)
      )
      self.sow('drift', 'drift', drift / 2)
    x = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)) + bias
    return x.astype(self.dtype)


def trainable_leaves(tree: dict) -> list[jax.Array]:
  """The leaves of a tree of parameters, or of their gradients, that are no running statistics."""
  return [
    leaf for keys, leaf in jax.tree.leaves_with_path(tree) if keys[-1].key not in RUNNING_STATISTICS
  ]


def batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean, variance) [c] of [b, h, w, c], over the devices too where each has rows of its own."""
  x = x.astype(jnp.float32)
  mean, square = x.mean(axis=(0, 1, 2)), (x * x).mean(axis=(0, 1, 2))
  if axes := jax.sharding.get_abstract_mesh().manual_axes:
    mean, square = jax.lax.pmean((mean, square), tuple(axes))
  return mean, jnp.maximum(square - mean * mean, 0)


def normalize_images(images: jax.Array, config: ModelConfig) -> jax.Array:
  """Images [b, h, w, 3] in the range of uint8 -> what the model sees, in the type that it computes in."""
  return ((images.astype(jnp.float32) - jnp.array(config.mean)) / jnp.array(config.scale)).astype(
    config.dtype
  )


def apply_head(features: jax.Array, classes: int, config: ModelConfig) -> jax.Array:
  """[b, d] -> [b, k]. Called inside a compact module, whose parameters head/kernel, at first zero, and head/bias it makes.

  In float32: around a head bias of -10, bfloat16 has steps of 1/16.
  """
  bias = nn.initializers.constant(config.head_bias)
  return nn.Dense(
    classes, dtype=jnp.float32, kernel_init=nn.initializers.zeros, bias_init=bias, name='head'
  )(features)


LEARNED_POSITIONS = ('learned', 'learned2d')  # Tables that are added to tokens.


class PositionEmbedding(nn.Module):
  """Learned vectors [1, n, d] for tokens like `x` [b, n, d], or [1, h, w, d] for those in their grid [b, h, w, d].

  'learned' has one for each token. 'learned2d' has one of half the width for each column and each row of the grid, side by
  side, and zeros for a class token, which is learned as it is.
  """

  kind: str
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    (h, w), n, d, normal = (
      self.grid,
      math.prod(x.shape[1:-1]),
      x.shape[-1],
      nn.initializers.normal(0.02),
    )
    if self.kind == 'learned':
      return self.param('pos_embedding', normal, (1, n, d)).reshape(1, *x.shape[1:]).astype(x.dtype)
    columns = self.param('column_embedding', normal, (w, d // 2)).astype(x.dtype)
    rows = self.param('row_embedding', normal, (h, d // 2)).astype(x.dtype)
    columns, rows = (
      jnp.broadcast_to(side, (h, w, d // 2)) for side in (columns[None], rows[:, None])
    )
    table = jnp.concatenate([columns, rows], axis=-1).reshape(1, h * w, d)
    return jnp.pad(table, ((0, 0), (n - h * w, 0), (0, 0))).reshape(1, *x.shape[1:])


class RelativePositionBias(nn.Module):
  """Queries [b, n, h, c] -> [b, h, n, n], to be added to the scores: each query times a vector of its offset to the key.

  Offsets are along the raster, and the vectors the same for all heads.
  """

  @nn.compact
  def __call__(self, q: jax.Array) -> jax.Array:
    n, c = q.shape[1], q.shape[-1]
    table = self.param('embedding', nn.initializers.normal(0.02), (2 * n - 1, c)).astype(q.dtype)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return jnp.einsum(
      'bnhc,nmc->bhnm', q * c**-0.5, table[offsets], preferred_element_type=jnp.float32
    )


def sincos2d_embedding(grid: tuple[int, int], width: int) -> jax.Array:
  """Fixed position embeddings [1, h·w, d] of arXiv 2205.01580: the sines and cosines of x, then those of y."""
  omega = 1e4 ** -jnp.linspace(0, 1, width // 4)
  y, x = (axis.reshape(-1, 1) * omega for axis in jnp.mgrid[: grid[0], : grid[1]])
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]
