"""softmax(q kᵀ / √c) v for every head: which kernel computes it, and when.

Shapes: b batch, n tokens, h heads, c channels of a head.
"""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """[b, n, h, c] queries over [b, m, h, c] keys and values -> [b, n, h, c]. The softmax is in float32."""
  scores = jnp.einsum('bnhc,bmhc->bhnm', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bhnm,bmhc->bnhc', weights, v)
