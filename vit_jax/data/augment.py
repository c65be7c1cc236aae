"""Augmentation on the device, over the whole global batch: what mixes examples, so that no host could do it alone."""

import jax
import jax.numpy as jnp


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Each image [b, h, w, c] and its targets [b, k] blended with its neighbour's in the batch (arXiv 1710.09412).

  One share, drawn from Beta(alpha, alpha), for the batch; at least half stays an image's own. The neighbour is the
  previous row, so that on many devices only one row of each crosses the network.
  """
  share = jax.random.beta(key, alpha, alpha)
  share = jnp.maximum(share, 1 - share)
  mix = lambda x: share * x + (1 - share) * jnp.roll(x, 1, axis=0)
  return mix(images.astype(jnp.float32)), mix(targets)
