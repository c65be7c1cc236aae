"""The train state, one update and one prediction.

Shapes: b batch, h w image, m labels of an example, k classes, d width.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.models.layers import trainable_leaves
from vit_jax.optim.losses import labels_to_targets
from vit_jax.optim.spike_guard import is_spike
from vit_jax.sharding.fsdp import (
  compute_fsdp_gradient,
  compute_gradient,
  join_params,
  shard_map_rows,
  split_params,
  state_specs,
  with_block_gather,
)
from vit_jax.sharding.mesh import Mesh

# Of labels [b, k], and with a teacher also its logits [b, k].
Targets = jax.Array | tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything a run carries from step to step, and the arrays of a checkpoint."""

  step: jax.Array  # Number of updates, int32.
  params: dict
  opt_state: optax.OptState
  ema: dict | None  # Moving average of the parameters, if enabled.

  @property
  def eval_params(self) -> dict:
    """The parameters to evaluate and to export: the moving average if there is one."""
    return self.params if self.ema is None else self.ema


def abstract_params(model: nn.Module, size: tuple[int, int]) -> dict:
  """Return the shapes of the model's parameters for images of `size` (h, w)."""
  images = jnp.zeros((1, *size, model.config.channels), jnp.uint8)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), images))['params']


def init_state(
  seed: int | jax.Array,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  size: tuple[int, int],
  ema: bool,
) -> TrainState:
  """Initialize a state. Under `jit` with `out_shardings`, no device ever holds all of it."""
  images = jnp.zeros((1, *size, model.config.channels), jnp.uint8)
  params = model.init(jax.random.key(seed), images)['params']
  average = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=average)


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  loss: Callable[..., jax.Array],
  lr: optax.Schedule,
  seed: int | jax.Array,
  mix: Callable | None = None,
  grad_accum_steps: int = 1,
  ema: float = 0.0,
  skip_spikes: float = 0.0,
  is_trained: dict | None = None,
  mesh: Mesh | None = None,
  grad_dtype: str = 'float32',
  sharpness: Callable | None = None,
  teach: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Return (new state, metrics) after one update.

  `batch` is {'image': uint8 [b, h, w, 3], 'label': int [b, m] or float [b, k], 'mask': bool [b]}.
  `loss` maps logits and targets, both [b, k], to losses [b]; their mean over the examples whose
  mask is True is minimized. Every random number is a function of `seed` and the step. `lr` is
  that of `tx`, for the metrics. Parameters that are False in the tree `is_trained` have no
  gradient. Over the devices of `mesh`, if any, gradients are summed in `grad_dtype`. `sharpness`,
  from optim/sharpness.py, replaces the gradient, but not the loss. `teach` is that of
  `images_and_targets`. If `skip_reasons` finds a reason, only the step counter changes.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)  # A new key for each step.
  images, targets = images_and_targets(batch, key, classes=model.classes, mix=mix, teach=teach)
  weights = batch['mask'] / jnp.maximum(batch['mask'].sum(), 1)
  trained, frozen = split_params(state.params, is_trained)
  options: dict = {'grad_accum_steps': grad_accum_steps, 'mesh': mesh, 'grad_dtype': grad_dtype}
  gradient = gradient_function(model, loss, **options)
  gradient_at = lambda trained: gradient(trained, frozen, (images, targets, weights), key)
  value, grads = gradient_at(trained)
  if sharpness is not None:
    grads = sharpness(lambda moved: gradient_at(moved)[1], trained, grads, state.step)
  norm = optax.tree.norm(trainable_leaves(grads))
  reasons = skip_reasons(state, value, norm, skip_spikes)
  skip = reasons['not_finite'] | reasons['spikes']
  update = functools.partial(
    apply_gradients, loss=value, norm=norm, tx=tx, ema=ema, is_trained=is_trained
  )
  new = jax.lax.cond(skip, lambda state, grads: state, update, state, grads)
  rate, skipped = jnp.asarray(lr(state.step), jnp.float32), jnp.sum(~batch['mask'])
  metrics = {'loss': value, 'lr': rate, 'grad_norm': norm, 'skipped': skipped}
  return new.replace(step=state.step + 1), metrics | reasons


def gradient_function(
  model: nn.Module, loss: Callable, *, grad_accum_steps: int, mesh: Mesh | None, grad_dtype: str
) -> Callable:
  """Return the function (trained, frozen, arrays, key) -> (loss, gradient) of a batch.

  `arrays` are those of `weighted_loss`.
  """
  gradient: Callable = compute_gradient
  if mesh is not None:
    gradient = functools.partial(compute_fsdp_gradient, mesh=mesh, grad_dtype=grad_dtype)
  loss_fn = functools.partial(weighted_loss, loss=loss)
  return functools.partial(gradient, loss_fn, model=model, grad_accum_steps=grad_accum_steps)


def images_and_targets(
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  classes: int,
  mix: Callable | None,
  teach: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Targets]:
  """Return the images [b, h, w, 3] and targets [b, k] of a batch.

  `mix`, from `data.mixup.make_mix`, mixes both. With `teach`, which maps images to a teacher's
  logits, the targets are (targets, logits of the mixed images).
  """
  images, targets = batch['image'], labels_to_targets(batch['label'], classes)
  if mix is not None:
    images, targets = mix(jax.random.fold_in(key, 0), images, targets, mask=batch['mask'])
  return images, targets if teach is None else (targets, teach(images))


def predict_sharded_logits(
  shards: dict, images: jax.Array, *, model: nn.Module, mesh: Mesh, parts: int = 1
) -> jax.Array:
  """Return the logits [b, k] of images [b, h, w, 3] by a model whose parameters are split.

  Each device computes those of its rows, in `parts` parts in sequence, which saves memory.
  """
  specs = state_specs(shards, mesh)

  def predict(shards: dict, images: jax.Array) -> jax.Array:
    local, gather = with_block_gather(model, specs)
    predict_part = functools.partial(predict_logits, gather(shards), model=local)
    if parts == 1:
      return predict_part(images)
    logits = jax.lax.map(predict_part, images.reshape(parts, -1, *images.shape[1:]))
    return logits.reshape(len(images), -1)

  logits: jax.Array = shard_map_rows(predict, mesh, specs)(shards, images)
  return logits


def apply_gradients(
  state: TrainState,
  grads: dict,
  *,
  loss: jax.Array,
  norm: jax.Array,
  tx: optax.GradientTransformation,
  ema: float,
  is_trained: dict | None,
) -> TrainState:
  """Return the state after an update of parameters, optimizer state and average. `step` stays.

  `grads` are those of the trained parameters. The others, and their averages, stay bit for bit.
  """
  trained, frozen = split_params(state.params, is_trained)
  grads = join_params(grads, jax.tree.map(jnp.zeros_like, frozen))
  updates, opt_state = optax.with_extra_args_support(tx).update(
    grads, state.opt_state, state.params, step=state.step, loss=loss, grad_norm=norm
  )
  trained = optax.apply_updates(trained, split_params(updates, is_trained)[0])
  params, average = join_params(trained, frozen), None
  if state.ema is not None:
    average, frozen = split_params(state.ema, is_trained)
    average = join_params(optax.incremental_update(trained, average, 1 - ema), frozen)
  return TrainState(step=state.step, params=params, opt_state=opt_state, ema=average)


def weighted_loss(
  params: dict,
  images: jax.Array,
  targets: Targets,
  weights: jax.Array,
  key: jax.Array,
  *,
  model: nn.Module,
  loss: Callable[..., jax.Array],
) -> jax.Array:
  """Return the sum of `weights * loss`.

  The model sows 'drift', whose gradient moves the running statistics of batch norm. It adds this
  gradient, but nothing to the value.
  """
  logits, sown = model.apply(
    {'params': params}, images, train=True, rngs={'dropout': key}, mutable=['drift']
  )
  drift = weights.sum() * sum(jax.tree.leaves(sown))
  return jnp.sum(weights * loss(logits, targets)) + (drift - jax.lax.stop_gradient(drift))


def skip_reasons(
  state: TrainState, loss: jax.Array, norm: jax.Array, skip_spikes: float
) -> dict[str, jax.Array]:
  """Return {'not_finite': bool, 'spikes': bool}: the reasons to skip a step, equal on all devices.

  `norm` is the norm of the gradients. It counts as not finite if its square overflows float32, from
  1.8e19 on, because clipping would turn such gradients into zeros.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  spike = is_spike(state.opt_state.history, loss, norm, skip_spikes) if skip_spikes else False
  return {'not_finite': ~finite, 'spikes': finite & spike}


def predict_logits(params: dict, images: jax.Array, *, model: nn.Module) -> jax.Array:
  """Return the logits [b, k] of images [b, h, w, 3]."""
  logits: jax.Array = model.apply({'params': params}, images)  # type: ignore[assignment]
  return logits
