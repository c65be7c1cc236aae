"""Mixup on the device (arXiv 1710.09412).

It runs on the global batch, because it mixes examples that lie on different hosts.
"""

import jax
import jax.numpy as jnp


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Blend each image [b, h, w, c] and its targets [b, k] with those of the previous row.

  One weight, drawn from Beta(alpha, alpha), is used for the whole batch. The larger of it and its
  complement goes to the image itself. Blending with the previous row means that only one row per
  device crosses the network.

  Returns:
    The blended images, float32, and the blended targets.
  """
  weight = jax.random.beta(key, alpha, alpha)
  weight = jnp.maximum(weight, 1 - weight)
  mix = lambda x: weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)
  return mix(images.astype(jnp.float32)), mix(targets)
