"""Recipes as the papers name them, made of optax.

A parameter's path is its names joined by '/', such as `Transformer/encoderblock/MlpBlock_3/Dense_0/kernel`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import OptimConfig, parse_duration
from vit_jax.errors import UserError
from vit_jax.models.layers import RUNNING_STATISTICS
from vit_jax.optim.spike_guard import guard_spikes

BLOCK_PATH_PREFIX = 'Transformer/encoderblock/'
HEAD_KERNEL_PATH = 'head/kernel'


def make_lr_schedule(config: OptimConfig, *, steps: int, epoch: float) -> optax.Schedule:
  """Step -> learning rate: a decay over the steps after the warm-up, times the warm-up's ramp, then the cool-down's.

  At the last step the linear and cosine decays, and every cool-down, are at `lr_end` (arXiv 2010.11929, Table 3).
  """
  warmup, cooldown = (
    parse_duration(getattr(config, name), name=f'optim.{name}', steps=steps, epoch=epoch)
    for name in RAMP_SETTINGS
  )
  decay = LR_DECAYS[config.schedule](
    config, steps - warmup, [drop - warmup for drop in lr_boundary_steps(config, steps, epoch)]
  )

  def lr(step):
    rate = decay(jnp.maximum(step - warmup, 0))
    rate = rate * jnp.minimum(1, step / warmup) if warmup else rate
    left = jnp.clip((steps - step) / cooldown, 0, 1) if cooldown else 1
    return config.lr_end + (rate - config.lr_end) * left

  return lr


RAMP_SETTINGS = ('warmup', 'cooldown')
LR_DECAYS = {
  'constant': lambda c, steps, _: optax.constant_schedule(c.lr),
  'linear': lambda c, steps, _: optax.linear_schedule(c.lr, c.lr_end, steps),
  'cosine': lambda c, steps, _: optax.cosine_decay_schedule(
    c.lr, steps, alpha=c.lr_end / c.lr if c.lr else 0
  ),
  # arXiv 2106.04560: 1/sqrt(t) from the end of the warm-up on.
  'rsqrt': lambda c, steps, _: lambda step: c.lr / jnp.sqrt(1 + step / c.rsqrt_timescale),
  'staircase': lambda c, steps, drops: (
    lambda step: c.lr * c.lr_boundary_factor ** (step >= jnp.array(drops)).sum()
  ),
}


def lr_boundary_steps(config: OptimConfig, steps: int, epoch: float) -> list[int]:
  """The steps of the run at which a staircase falls."""
  at = [
    parse_duration(text, name='optim.lr_boundaries', steps=steps, epoch=epoch)
    for text in config.lr_boundaries.split(',')
    if text
  ]
  every = parse_duration(
    config.lr_boundary_every, name='optim.lr_boundary_every', steps=steps, epoch=epoch
  )
  return at + list(range(every, steps, every)) if every else at


def scale_by_adafactor(config: OptimConfig) -> optax.GradientTransformation:
  """Adafactor as "Scaling Vision Transformers" uses it (arXiv 2106.04560): factored second moments for sides of 32 and up,
  their decay 1 - t^-0.8 at most `b2`, then a moving average of the updates; no parameter scale, no update clipping."""
  decay = lambda step, rate: jnp.minimum(config.b2, 1 - (step + 1.0) ** -rate)
  rms = functools.partial(
    optax.scale_by_factored_rms, decay_rate=0.8, min_dim_size_to_factor=32, decay_rate_fn=decay
  )

  def kind(keys, leaf) -> str:
    sides = (
      leaf.shape[1:] if param_path(keys).startswith(BLOCK_PATH_PREFIX) else leaf.shape
    )  # The depth is no side of a matrix.
    return 'factored' if sum(side >= 32 for side in sides) > 1 else 'whole'

  kinds = functools.partial(jax.tree.map_with_path, kind)
  return optax.chain(
    optax.partition({'factored': rms(), 'whole': rms(factored=False)}, kinds),
    optax.ema(config.b1, debias=False, accumulator_dtype=config.momentum_dtype),
  )


UPDATE_RULES = {
  'adamw': lambda c: optax.scale_by_adam(b1=c.b1, b2=c.b2, mu_dtype=c.momentum_dtype),
  'sgd': lambda c: optax.trace(decay=c.b1, accumulator_dtype=c.momentum_dtype),
  'adafactor': scale_by_adafactor,
  # TensorFlow's, as EfficientNets are trained: a moving average of squares that starts at 1, its epsilon under the root.
  'rmsprop': lambda c: optax.chain(
    optax.scale_by_rms(decay=c.b2, eps=1e-3, initial_scale=1.0, eps_in_sqrt=True),
    optax.trace(decay=c.b1, accumulator_dtype=c.momentum_dtype),
  ),
}


def make_optimizer(
  config: OptimConfig, lr: optax.Schedule, params
) -> optax.GradientTransformationExtraArgs:
  """Gradients -> updates: clip, the rule, weight decay, layer-wise rates, the learning rate; frozen parameters get nothing, and
  running statistics what models/norm.py wants.

  An update is told the run's `step` and the gradients' `grad_norm`, and where spikes are skipped its `loss`. `params` may be
  shapes. UserError where a pattern matches no parameter, or nothing is left to train.
  """
  decay = add_weight_decay(config, params) if config.weight_decay else None
  chain = [
    clip_by_grad_norm(config) if config.grad_clip_norm else None,
    decay if config.coupled_weight_decay else None,
    UPDATE_RULES[config.name](config),
    None if config.coupled_weight_decay else decay,
    add_head_weight_decay(config, params)
    if config.weight_decay and config.head_weight_decay_factor != 1
    else None,
    scale_by_layer_decay(config.layer_decay, params) if config.layer_decay != 1 else None,
    scale_by_step_lr(lr),
  ]
  tx = partition_by_kind(config, optax.chain(*(part for part in chain if part)), params)
  return guard_spikes(tx, config.spike_window) if config.skip_spikes else tx


def clip_by_grad_norm(config: OptimConfig) -> optax.GradientTransformation:
  """Gradients whose global norm is above `clip_by_grad_norm` scaled down to it.

  By the `grad_norm` that an update is told, which saves reading all gradients again; where parameters are frozen, that of the
  others has to be found first.
  """
  if config.freeze:
    return optax.clip_by_global_norm(config.grad_clip_norm)

  def update(updates, state, params=None, *, grad_norm, **others):
    del params, others
    scale = config.grad_clip_norm / jnp.maximum(grad_norm, config.grad_clip_norm)
    return jax.tree.map(lambda x: scale.astype(x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_step_lr(lr: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Updates times -lr(`step`), the run's own: a step that is left out delays no schedule, as a count of updates would."""

  def update(updates, state, params=None, *, step, **others):
    del params, others
    return jax.tree.map(lambda x: jnp.array(-lr(step), x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def partition_by_kind(
  config: OptimConfig, tx: optax.GradientTransformation, params
) -> optax.GradientTransformation:
  """`tx` for the parameters that are trained; frozen ones get no updates, and running statistics plain SGD."""
  kinds = {
    'trained': tx,
    'frozen': optax.set_to_zero(),
    'statistics': optax.sgd(1 - config.norm_momentum),
  }
  labels = label_params_by_kind(config, params)
  present = set(jax.tree.leaves(labels))
  if 'trained' not in present:
    raise UserError(
      f'config.optim.freeze={config.freeze!r} matches every parameter: nothing is left to train'
    )
  if 'statistics' not in present and config.norm_momentum != OptimConfig().norm_momentum:
    raise UserError(
      f'config.optim.norm_momentum={config.norm_momentum:g}: the model has no batch norm, so it has '
      'no running statistics; leave the setting at its default'
    )
  return (
    tx
    if present == {'trained'}
    else optax.partition({kind: kinds[kind] for kind in present}, labels)
  )


def label_params_by_kind(config: OptimConfig, params):
  """A tree that says of each parameter whether it is trained, frozen, or a running statistic of models/norm.py."""
  frozen = (
    match_params(params, config.freeze, 'freeze')
    if config.freeze
    else jax.tree.map(lambda _: False, params)
  )

  def kind(keys, frozen) -> str:
    return 'frozen' if frozen else 'statistics' if keys[-1].key in RUNNING_STATISTICS else 'trained'

  return jax.tree.map_with_path(kind, frozen)


def add_weight_decay(config: OptimConfig, params) -> optax.GradientTransformation:
  """The weight decay of the parameters that it is said of."""
  return optax.add_decayed_weights(
    config.weight_decay, match_params(params, config.weight_decay_mask, 'weight_decay_mask')
  )


def add_head_weight_decay(config: OptimConfig, params) -> optax.GradientTransformation:
  """The weight decay of the head's kernel, where it decays at all, beyond that of the others."""
  both = jax.tree.map(
    lambda a, b: a and b,
    match_params(params, config.weight_decay_mask, 'weight_decay_mask'),
    match_params(params, HEAD_KERNEL_PATH, 'head_weight_decay_factor'),
  )
  return optax.add_decayed_weights(
    config.weight_decay * (config.head_weight_decay_factor - 1), both
  )


def param_path(keys) -> str:
  """The path of a leaf from the keys that jax.tree_util gives."""
  return '/'.join(str(key.key) for key in keys)


def match_params(params, pattern: str, name: str):
  """A tree of bools: whose path does `pattern` match as a whole? UserError where that is no leaf's."""
  tree = jax.tree.map_with_path(
    lambda keys, _: bool(re.fullmatch(pattern, param_path(keys))), params
  )
  if not any(jax.tree.leaves(tree)):
    some = param_path(jax.tree.leaves_with_path(params)[0][0])
    raise UserError(
      f'config.optim.{name}={pattern!r} matches no parameter; a whole path looks like {some!r}'
    )
  return tree


def scale_by_layer_decay(decay: float, params) -> optax.GradientTransformation:
  """Updates times `decay` to the power of a parameter's distance from the head, counted in blocks (arXiv 2106.08254).

  The head and the last norm are at 0, block i of L at L - i, all that comes before the blocks at L + 1. `params` are
  those of the whole model, frozen or not, and may be shapes. UserError for a model without such blocks.
  """
  blocks = (
    leaf
    for keys, leaf in jax.tree.leaves_with_path(params)
    if param_path(keys).startswith(BLOCK_PATH_PREFIX)
  )
  depth = next((leaf.shape[0] for leaf in blocks), 0)
  if not depth:
    raise UserError(
      f'config.optim.layer_decay={decay}: only Transformers have blocks whose learning rates could fall'
    )

  def scale(keys, update):
    path = param_path(keys)
    if path.startswith(BLOCK_PATH_PREFIX):
      rates = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
      return update * rates.reshape(depth, *[1] * (update.ndim - 1)).astype(update.dtype)
    after = re.match('Transformer/encoder_norm/|MAPHead_0/|pre_logits/|head/|patch_head/', path)
    return update if after else update * decay ** (depth + 1)

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))
