"""The two ends that all models have: pixels in, logits out. Shapes: b batch, h w image, d width of the features, k classes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig


def normalised(images: jax.Array, config: ModelConfig) -> jax.Array:
  """Images [b, h, w, 3] in the range of uint8 -> what the model sees, in the type that it computes in."""
  return ((images.astype(jnp.float32) - jnp.array(config.mean)) / jnp.array(config.scale)).astype(config.dtype)


def logits(features: jax.Array, classes: int, config: ModelConfig) -> jax.Array:
  """[b, d] -> [b, k]. Called inside a compact module, whose parameters head/kernel, at first zero, and head/bias it makes.

  In float32: around a head bias of -10, bfloat16 has steps of 1/16.
  """
  bias = nn.initializers.constant(config.head_bias)
  return nn.Dense(classes, dtype=jnp.float32, kernel_init=nn.initializers.zeros, bias_init=bias, name='head')(features)
