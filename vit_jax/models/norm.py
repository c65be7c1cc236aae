"""Batch norm whose running statistics are parameters, pulled to the batch's by a loss of their own.

The loss ½ (running - batch)² has the gradient running - batch, of which plain SGD at the rate 1 - momentum makes the moving
average momentum · running + (1 - momentum) · batch. So what adds up gradients over devices and over parts of a batch does this
too, and a run's state holds nothing but parameters. step.py adds these losses, at no value; optim.py keeps everything else that
is done to gradients away from them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-3  # EfficientNet's.
STATISTICS = ('running_mean', 'running_var')  # What no other parameter is called.


class BatchNorm(nn.Module):
  """[b, h, w, c] with mean 0 and deviation 1 over (b, h, w) of all devices in training, by running statistics otherwise.

  Sows 'drift': the loss, a scalar. Statistics are in float32; an image that the batch's mask leaves out counts in them.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    param = lambda name, init: self.param(name, init, x.shape[-1:])
    scale, bias = param('scale', nn.initializers.ones), param('bias', nn.initializers.zeros)
    running = param('running_mean', nn.initializers.zeros), param('running_var', nn.initializers.ones)
    mean, var = of_batch(x) if train else running
    if train:
      drift = sum(jnp.sum((a - jax.lax.stop_gradient(b)) ** 2) for a, b in zip(running, (mean, var), strict=True))
      self.sow('drift', 'drift', drift / 2)
    x = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias
    return x.astype(self.dtype)


def learned(tree: dict) -> list[jax.Array]:
  """The leaves of a tree of parameters, or of their gradients, that are no running statistics."""
  return [leaf for keys, leaf in jax.tree.leaves_with_path(tree) if keys[-1].key not in STATISTICS]


def of_batch(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean, variance) [c] of [b, h, w, c], over the devices too where each has rows of its own."""
  x = x.astype(jnp.float32)
  mean, square = x.mean(axis=(0, 1, 2)), (x * x).mean(axis=(0, 1, 2))
  if axes := jax.sharding.get_abstract_mesh().manual_axes:
    mean, square = jax.lax.pmean((mean, square), tuple(axes))
  return mean, jnp.maximum(square - mean * mean, 0)
