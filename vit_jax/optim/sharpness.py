"""Sharpness-aware minimization: SAM (arXiv 2010.01412) and GSAM (arXiv 2203.08065).

A step computes a second gradient, at parameters that are `rho` away in the direction of the first,
and updates with it. Both gradients are those of the whole batch, on all devices and in all parts of
`grad_accum_steps`. The published code moves the parameters on each device by the gradient of its
own rows, so its results depend on the number of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import OptimConfig
from vit_jax.models.layers import RUNNING_STATISTICS, trainable_leaves

MIN_NORM = 1e-12


def make_sharpness(config: OptimConfig, lr: optax.Schedule) -> Callable | None:
  """Return the function (compute_gradient, params, gradient, step) -> gradient; None if off."""
  if not config.sam_rho:
    return None
  rho = make_rho_schedule(config, lr)

  def sharpness(compute_gradient: Callable, params: dict, gradient: dict, step: jax.Array) -> dict:
    return sharpness_aware_gradient(
      compute_gradient, params, gradient, rho=rho(step), alpha=config.gsam_alpha
    )

  return sharpness


def forward_passes(config: OptimConfig) -> int:
  """Return how many forward passes a step costs: a gradient counts as three."""
  return 6 if config.sam_rho else 3


def make_rho_schedule(config: OptimConfig, lr: optax.Schedule) -> optax.Schedule:
  """Return rho by step: `sam_rho` at the peak of the learning rate, `sam_rho_min` at `lr_end`.

  Between them, and below them in a warm-up, it is linear in the learning rate, but never negative.
  """
  high, low, span = config.sam_rho, config.sam_rho_min, config.lr - config.lr_end
  if not low:
    return optax.constant_schedule(high)
  return lambda step: jnp.maximum(0, low + (high - low) * (lr(step) - config.lr_end) / span)


def sharpness_aware_gradient(
  compute_gradient: Callable[[dict], dict],
  params: dict,
  gradient: dict,
  *,
  rho: jax.Array | float,
  alpha: float,
) -> dict:
  """Return the gradient at params + rho · gradient / ‖gradient‖.

  With `alpha`, GSAM subtracts alpha times the part of `gradient` that is orthogonal to it, which
  lowers the difference between the losses at both points. Running statistics neither move nor
  count: they have the gradient of the first pass.

  Args:
    compute_gradient: Maps parameters to the gradient of the batch.
    params: The trained parameters.
    gradient: The gradient at `params`.
    rho: Distance, in the norm of all trained parameters together.
    alpha: Weight of GSAM's second term; 0 means SAM.
  """
  scale = rho / (optax.tree.norm(trainable_leaves(gradient)) + MIN_NORM)
  move = lambda x, g: x + (scale * g).astype(x.dtype)
  robust = compute_gradient(map_trainable(move, params, params, gradient))
  if not alpha:
    return map_trainable(lambda g: g, gradient, robust)
  ours, first = trainable_leaves(robust), trainable_leaves(gradient)
  part = optax.tree.vdot(first, ours) / (optax.tree.vdot(ours, ours) + MIN_NORM**2)
  combine = lambda r, g: r - alpha * (g - part * r)
  return map_trainable(combine, gradient, robust, gradient)


def map_trainable(function: Callable, rest: dict, *trees: dict) -> dict:
  """Map a function over the leaves of `trees`; running statistics are those of `rest`."""

  def choose(keys, own, *leaves):
    return own if keys[-1].key in RUNNING_STATISTICS else function(*leaves)

  return jax.tree.map_with_path(choose, rest, *trees)
