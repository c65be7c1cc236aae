"""Dropout (Srivastava et al., 2014) of which nothing is kept for the backward pass.

Dropping is linear, and its own transpose: the gradient is dropped with the same key, which draws the same mask again. That
costs less than to write a mask and read it: for ViT-B/16 at 256 images a chip the masks would take 16 GB.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
  """Sets a share `rate` of the elements to 0 and scales up the others, with a key of the stream 'dropout'."""

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.deterministic or not self.rate:
      return x
    return dropped(x, self.make_rng('dropout'), rate=self.rate)


def keep_path(branch: jax.Array, key: jax.Array, rate: jax.Array | float) -> jax.Array:
  """The branch [b, …], zero for a share `rate` of the images and scaled up for the others (arXiv 1603.09382)."""
  kept = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], *[1] * (branch.ndim - 1)))
  return jnp.where(kept, branch / jnp.asarray(1 - rate, branch.dtype), 0)


def dropped(x: jax.Array, key: jax.Array, *, rate: float) -> jax.Array:
  """`x`, or its gradient, with the mask that `key` draws."""

  def drop(key, x):
    kept = jax.random.bits(key, x.shape, jnp.uint32) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)

  return jax.custom_derivatives.linear_call(drop, drop, key, x)
