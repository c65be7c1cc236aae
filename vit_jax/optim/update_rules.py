"""Update rules: from the gradient to the update before weight decay and learning rate."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import OptimConfig
from vit_jax.models.layers import BLOCK_PATH_PREFIX
from vit_jax.optim.muon import scale_by_muon
from vit_jax.optim.param_paths import param_path


def scale_by_adafactor(config: OptimConfig) -> optax.GradientTransformation:
  """Adafactor as in "Scaling Vision Transformers" (arXiv 2106.04560), without the learning rate.

  Second moments are factored if two sides of a parameter are at least 32. Their decay rate is
  1 - t^-0.8, at most `b2`. A moving average of the updates follows. There is no scaling by
  parameter size and no update clipping.
  """
  decay = lambda step, rate: jnp.minimum(config.b2, 1 - (step + 1.0) ** -rate)
  scale_by_rms = functools.partial(
    optax.scale_by_factored_rms, decay_rate=0.8, min_dim_size_to_factor=32, decay_rate_fn=decay
  )

  def label(keys, leaf) -> str:
    stacked = param_path(keys).startswith(BLOCK_PATH_PREFIX)
    sides = leaf.shape[1:] if stacked else leaf.shape  # The depth is not a side of a matrix.
    if sum(side >= 32 for side in sides) < 2:
      return 'whole'
    # Optax factors the two largest sides, which must not include the depth.
    return 'per_block' if stacked and 0 in np.argsort(leaf.shape)[-2:] else 'factored'

  # The labels are part of checkpoint paths.
  rules = {
    'factored': scale_by_rms(),
    'whole': scale_by_rms(factored=False),
    'per_block': map_over_blocks(scale_by_rms()),
  }
  return optax.chain(
    partition_by_used_labels(rules, functools.partial(jax.tree.map_with_path, label)),
    optax.ema(config.b1, debias=False, accumulator_dtype=config.momentum_dtype),
  )


def map_over_blocks(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Apply a factored rule to each block of stacked parameters [depth, …] separately."""
  axes = optax.FactoredState(count=None, v_row=0, v_col=0, v=0)
  update = jax.vmap(rule.update, in_axes=(0, axes, 0), out_axes=(0, axes))
  return optax.GradientTransformation(jax.vmap(rule.init, out_axes=axes), update)


def partition_by_used_labels(
  rules: dict[str, optax.GradientTransformation], label_tree: Callable
) -> optax.GradientTransformation:
  """Partition as `optax.partition` does, without state for 'per_block' if no leaf has this label.

  Checkpoints of models without such leaves then have the same arrays as before the label existed.
  """

  def partition(tree) -> optax.GradientTransformation:
    labels = label_tree(tree)
    used = {'factored', 'whole', *jax.tree.leaves(labels)}
    return optax.partition({name: rules[name] for name in rules if name in used}, labels)

  return optax.GradientTransformation(
    lambda params: partition(params).init(params),
    lambda updates, state, params=None: partition(updates).update(updates, state, params),
  )


UPDATE_RULES = {
  'adamw': lambda c: optax.scale_by_adam(b1=c.b1, b2=c.b2, mu_dtype=c.momentum_dtype),
  'sgd': lambda c: optax.trace(decay=c.b1, accumulator_dtype=c.momentum_dtype),
  'adafactor': scale_by_adafactor,
  # The chain scales these updates by LAMB's trust ratio, after the weight decay.
  'lamb': lambda c: optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=1e-6, mu_dtype=c.momentum_dtype),
  'lion': lambda c: optax.scale_by_lion(b1=c.b1, b2=c.b2, mu_dtype=c.momentum_dtype),
  'muon': scale_by_muon,
  # TensorFlow's RMSProp, which trains EfficientNets: the mean square starts at 1, and epsilon is
  # under the root.
  'rmsprop': lambda c: optax.chain(
    optax.scale_by_rms(decay=c.b2, eps=1e-3, initial_scale=1.0, eps_in_sqrt=True),
    optax.trace(decay=c.b1, accumulator_dtype=c.momentum_dtype),
  ),
}
