"""Mixup on the device (arXiv 1710.09412).

It runs on the global batch, because it mixes examples that lie on different hosts.
"""

import jax
import jax.numpy as jnp


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, mask: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Blend each image and its targets with those of the previous row.

  One weight, drawn from Beta(alpha, alpha), is used for the whole batch. The larger of it and its
  complement goes to the image itself. Blending with the previous row means that only one row per
  device crosses the network.

  Args:
    key: The key of the draw.
    images: [b, h, w, c].
    targets: [b, k].
    mask: bool [b], False in rows without an image, such as one that could not be read. Neither
      such a row nor the row after it is blended.
    alpha: The parameter of the Beta distribution.

  Returns:
    The blended images, float32, and the blended targets.
  """
  weight = jax.random.beta(key, alpha, alpha)
  weight = jnp.where(mask & jnp.roll(mask, 1), jnp.maximum(weight, 1 - weight), 1)  # [b]

  def mix(x: jax.Array) -> jax.Array:
    w = weight.reshape(-1, *[1] * (x.ndim - 1))
    return w * x + (1 - w) * jnp.roll(x, 1, axis=0)

  return mix(images.astype(jnp.float32)), mix(targets)
