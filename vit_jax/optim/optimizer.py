"""Optimizers and learning-rate schedules of the papers, built from optax."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import OptimConfig
from vit_jax.errors import UserError
from vit_jax.models.layers import BLOCK_PATH_PREFIX, RUNNING_STATISTICS
from vit_jax.optim.durations import parse_duration
from vit_jax.optim.muon import label_by_rule
from vit_jax.optim.param_paths import match_params, param_path
from vit_jax.optim.spike_guard import guard_spikes
from vit_jax.optim.update_rules import UPDATE_RULES

AFTER_BLOCKS = 'Transformer/encoder_norm/|fc_norm/|MAPHead_0/|pre_logits/|head/|patch_head/'
HEAD_KERNEL_PATH = 'head/kernel'
RAMP_SETTINGS = ('warmup', 'cooldown')


def make_lr_schedule(config: OptimConfig, *, steps: int, epoch: float) -> optax.Schedule:
  """Return the learning rate as a function of the step.

  It is a decay over the steps after the warm-up, times the linear ramp of the warm-up. The
  cool-down then interpolates linearly to `lr_end`. At the last step the linear and cosine decays,
  and every cool-down, are at `lr_end` (arXiv 2010.11929, Table 3).

  Args:
    config: Settings; durations are in steps, epochs or percent.
    steps: Steps of the run.
    epoch: Steps of an epoch.
  """
  warmup, cooldown = (
    parse_duration(getattr(config, name), name=f'optim.{name}', steps=steps, epoch=epoch)
    for name in RAMP_SETTINGS
  )
  boundaries = [step - warmup for step in lr_boundary_steps(config, steps, epoch)]
  decay = LR_DECAYS[config.schedule](config, steps - warmup, boundaries)

  def lr(step):
    rate = decay(jnp.maximum(step - warmup, 0))
    rate = rate * jnp.minimum(1, step / warmup) if warmup else rate
    remaining = jnp.clip((steps - step) / cooldown, 0, 1) if cooldown else 1
    return config.lr_end + (rate - config.lr_end) * remaining

  return lr


# Functions of (config, steps, boundaries) that return a schedule. All steps are counted from the
# end of the warm-up.
LR_DECAYS = {
  'constant': lambda c, steps, _: optax.constant_schedule(c.lr),
  'linear': lambda c, steps, _: optax.linear_schedule(c.lr, c.lr_end, steps),
  'cosine': lambda c, steps, _: optax.cosine_decay_schedule(
    c.lr, steps, alpha=c.lr_end / c.lr if c.lr else 0
  ),
  'rsqrt': lambda c, steps, _: lambda step: c.lr / jnp.sqrt(1 + step / c.rsqrt_timescale),
  'staircase': lambda c, steps, boundaries: (
    lambda step: c.lr * c.lr_boundary_factor ** (step >= jnp.array(boundaries)).sum()
  ),
}  # The rsqrt schedule is from arXiv 2106.04560.


def lr_boundary_steps(config: OptimConfig, steps: int, epoch: float) -> list[int]:
  """Return the steps of the run at which a staircase multiplies the learning rate."""
  parse = functools.partial(parse_duration, steps=steps, epoch=epoch)
  boundaries = config.lr_boundaries.split(',') if config.lr_boundaries else []
  boundaries = [parse(text, name='optim.lr_boundaries') for text in boundaries if text]
  every = parse(config.lr_boundary_every, name='optim.lr_boundary_every')
  return boundaries + list(range(every, steps, every)) if every else boundaries


def make_optimizer(
  config: OptimConfig, lr: optax.Schedule, params
) -> optax.GradientTransformationExtraArgs:
  """Return the optimizer that `config` describes.

  It clips the gradients, applies the update rule, decays the weights, and scales by layer and
  learning rate. Frozen parameters get no update, and running statistics get plain SGD.

  `update` needs the keywords `step`, the step of the run, and `grad_norm`, the global norm of the
  gradients. With `skip_spikes` it also needs `loss`.

  Args:
    config: Settings.
    lr: Learning rate by step.
    params: Parameters of the model, or their shapes.

  Raises UserError if a pattern matches no parameter, if no parameter is trained, or if a setting
  has no effect on this model.
  """
  decay = add_weight_decay(config, params) if config.weight_decay else None
  decay_head = config.weight_decay and config.head_weight_decay_factor != 1
  chain = [
    clip_by_grad_norm(config) if config.grad_clip_norm else None,
    decay if config.coupled_weight_decay else None,
    UPDATE_RULES[config.name](config),
    None if config.coupled_weight_decay else decay,
    add_head_weight_decay(config, params) if decay_head else None,
    scale_by_trust_ratio(config, params) if config.name == 'lamb' else None,
    scale_by_layer_decay(config.layer_decay, params) if config.layer_decay != 1 else None,
    scale_by_step_lr(lr),
  ]
  if config.name == 'muon':
    check_hidden_matrices(config, params)
  tx = partition_by_kind(config, optax.chain(*(part for part in chain if part)), params)
  return guard_spikes(tx, config.spike_window) if config.skip_spikes else tx


def clip_by_grad_norm(config: OptimConfig) -> optax.GradientTransformation:
  """Scale gradients down so that their global norm is at most `grad_clip_norm`.

  Uses the keyword `grad_norm` of the update, which saves reading all gradients again. With frozen
  parameters, the norm of the trained ones is computed instead.
  """
  if config.freeze:
    return optax.clip_by_global_norm(config.grad_clip_norm)

  def update(updates, state, params=None, *, grad_norm, **extra_args):
    del params, extra_args
    scale = config.grad_clip_norm / jnp.maximum(grad_norm, config.grad_clip_norm)
    return jax.tree.map(lambda x: scale.astype(x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_step_lr(lr: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Multiply updates by -lr(step), with the keyword `step` of the update.

  Since `step` is the step of the run and not a count of updates, a skipped step does not delay the
  schedule.
  """

  def update(updates, state, params=None, *, step, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda x: jnp.array(-lr(step), x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def partition_by_kind(
  config: OptimConfig, tx: optax.GradientTransformation, params
) -> optax.GradientTransformation:
  """Apply `tx` to trained parameters, nothing to frozen ones and SGD to running statistics.

  Raises UserError if no parameter is trained, or if `norm_momentum` is set but there are no running
  statistics to update.
  """
  labels = label_params_by_kind(config, params)
  present = set(jax.tree.leaves(labels))
  if 'trained' not in present:
    raise UserError(
      f'config.optim.freeze={config.freeze!r} matches every parameter: nothing is left to train'
    )
  if 'statistics' not in present and config.norm_momentum != OptimConfig().norm_momentum:
    raise UserError(
      f'config.optim.norm_momentum={config.norm_momentum:g}: the model has no running statistics '
      'of a batch norm, or all of them are frozen; leave the setting at its default'
    )
  if present == {'trained'}:
    return tx
  # The labels are part of checkpoint paths.
  rules = {
    'trained': tx,
    'frozen': optax.set_to_zero(),
    'statistics': optax.sgd(1 - config.norm_momentum),
  }
  return optax.partition({kind: rules[kind] for kind in present}, labels)


def label_params_by_kind(config: OptimConfig, params):
  """Return a tree with 'trained', 'frozen' or 'statistics' for each parameter.

  'statistics' are the running statistics of models/layers.py.
  """
  if config.freeze:
    is_frozen = match_params(params, config.freeze, 'freeze')
  else:
    is_frozen = jax.tree.map(lambda _: False, params)

  def label(keys, is_frozen) -> str:
    if is_frozen:
      return 'frozen'
    return 'statistics' if keys[-1].key in RUNNING_STATISTICS else 'trained'

  return jax.tree.map_with_path(label, is_frozen)


def find_trained(config: OptimConfig, params) -> dict | None:
  """Return a tree with False for each frozen parameter and True for the others; None if all are."""
  if not config.freeze:
    return None
  return jax.tree.map(lambda kind: kind != 'frozen', label_params_by_kind(config, params))


def add_weight_decay(config: OptimConfig, params) -> optax.GradientTransformation:
  """Add the weight decay of the parameters that `weight_decay_mask` matches."""
  mask = match_params(params, config.weight_decay_mask, 'weight_decay_mask')
  return optax.add_decayed_weights(config.weight_decay, mask)


def add_head_weight_decay(config: OptimConfig, params) -> optax.GradientTransformation:
  """Add the weight decay of the head's kernel beyond what `add_weight_decay` adds to it.

  It adds nothing if `weight_decay_mask` does not match the kernel.
  """
  mask = jax.tree.map(
    lambda decays, is_head: decays and is_head,
    match_params(params, config.weight_decay_mask, 'weight_decay_mask'),
    match_params(params, HEAD_KERNEL_PATH, 'head_weight_decay_factor'),
  )
  excess = config.weight_decay * (config.head_weight_decay_factor - 1)
  return optax.add_decayed_weights(excess, mask)


def scale_by_trust_ratio(config: OptimConfig, params) -> optax.GradientTransformation:
  """Scale each update to the norm of its parameter (LAMB, arXiv 1904.00962).

  The ratio is that of a parameter of one block. Parameters that `weight_decay_mask` does not match
  have none, as in the authors' code and in timm. The ratio is 1 if one of the norms is 0. Queries,
  keys and values have a ratio each, where timm's fused kernel has one.
  """
  mask = match_params(params, config.weight_decay_mask, 'weight_decay_mask')

  def scale(keys, update, param):
    stacked = param_path(keys).startswith(BLOCK_PATH_PREFIX)
    axes = tuple(range(stacked, update.ndim))
    ours, theirs = (
      jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (param, update)
    )
    is_zero = (ours == 0) | (theirs == 0)
    return update * jnp.where(is_zero, 1, ours / jnp.where(is_zero, 1, theirs))

  rule = optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates, params))
  return optax.masked(rule, mask)


def check_hidden_matrices(config: OptimConfig, params):
  """Raise UserError unless Muon has a matrix to orthogonalize among the trained parameters."""
  kinds, rules = label_params_by_kind(config, params), label_by_rule(params)
  pairs = zip(jax.tree.leaves(kinds), jax.tree.leaves(rules), strict=True)
  if ('trained', 'muon') not in pairs:
    raise UserError(
      "config.optim.name='muon': no trained parameter is a matrix between embedding and head, so "
      "that all would have AdamW; use config.optim.name='adamw'"
    )


def scale_by_layer_decay(decay: float, params) -> optax.GradientTransformation:
  """Multiply updates by `decay` to the power of the distance from the head (arXiv 2106.08254).

  The distance is counted in blocks: 0 for the head and the final norm, L - i for block i of L, and
  L + 1 for everything before the blocks.

  Args:
    decay: Factor per block.
    params: Parameters of the full model, frozen ones included, or their shapes.

  Raises UserError if the model has no Transformer blocks.
  """
  leaves = jax.tree.leaves_with_path(params)
  depths = (x.shape[0] for keys, x in leaves if param_path(keys).startswith(BLOCK_PATH_PREFIX))
  depth = next(depths, 0)
  if not depth:
    raise UserError(
      f'config.optim.layer_decay={decay}: only Transformers have blocks, and this model has none; '
      'use 1'
    )

  def scale(keys, update):
    path = param_path(keys)
    if path.startswith(BLOCK_PATH_PREFIX):
      factors = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
      return update * factors.reshape(depth, *[1] * (update.ndim - 1)).astype(update.dtype)
    after = re.match(AFTER_BLOCKS, path)
    return update if after else update * decay ** (depth + 1)

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))
