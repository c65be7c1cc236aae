"""What is trained, one update of it, and one prediction. Shapes: b batch, h w image, m labels of an example, k classes."""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from vit_jax.data.mixup import mixup
from vit_jax.models.layers import trainable_leaves
from vit_jax.optim.losses import labels_to_targets
from vit_jax.optim.spike_guard import is_spike
from vit_jax.sharding.fsdp import all_gather_params, shard_map_gradient, state_specs
from vit_jax.sharding.mesh import Mesh


@flax.struct.dataclass
class TrainState:
  """All that a run carries from step to step, and all that a checkpoint holds."""

  step: jax.Array  # Updates done, int32.
  params: dict
  opt_state: optax.OptState
  ema: dict | None  # A moving average of the parameters, where one is asked for.

  @property
  def eval_params(self) -> dict:
    """The parameters to evaluate and to hand on."""
    return self.params if self.ema is None else self.ema


def abstract_params(model: nn.Module, size: tuple[int, int]) -> dict:
  """The shapes of the model's parameters for images of `size`."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3), jnp.uint8)))[
    'params'
  ]


def init_state(
  seed: int | jax.Array,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  size: tuple[int, int],
  ema: bool,
) -> TrainState:
  """A fresh state. Under `jit` with out_shardings it is never whole on one device."""
  params = model.init(jax.random.key(seed), jnp.zeros((1, *size, 3), jnp.uint8))['params']
  average = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=average)


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  lr: optax.Schedule,
  seed: int | jax.Array,
  mixup_alpha: float = 0.0,
  grad_accum_steps: int = 1,
  ema: float = 0.0,
  skip_spikes: float = 0.0,
  mesh: Mesh | None = None,
  grad_dtype: str = 'float32',
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from {'image': uint8 [b, h, w, 3], 'label': int [b, m] or float [b, k], 'mask': bool [b]}.

  The loss is the mean over the examples that the mask keeps. Every random number is a function of `seed` and the step.
  `lr` is the schedule in `tx`, for the record. Over the devices of `mesh`, if any, gradients are summed in `grad_dtype`.
  Where `skip_reasons` says so, nothing but the step changes: all else keeps its bits.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  images, targets = batch['image'], labels_to_targets(batch['label'], model.classes)
  if mixup_alpha:
    images, targets = mixup(jax.random.fold_in(key, 0), images, targets, mixup_alpha)
  weights = batch['mask'] / jnp.maximum(batch['mask'].sum(), 1)

  gradient = functools.partial(accumulate_gradient, model=model, loss=loss, parts=grad_accum_steps)
  if mesh is not None:
    specs = state_specs(state.params, mesh)
    gradient = functools.partial(gradient, specs=specs, grad_dtype=grad_dtype)
    gradient = shard_map_gradient(gradient, mesh, specs, grad_dtype)
  value, grads = gradient(state.params, (images, targets, weights), key)
  norm = optax.tree.norm(trainable_leaves(grads))
  why = skip_reasons(state, value, norm, skip_spikes)
  told = {'step': state.step, 'loss': value, 'grad_norm': norm}

  def update(state: TrainState) -> TrainState:
    updates, opt_state = optax.with_extra_args_support(tx).update(
      grads, state.opt_state, state.params, **told
    )
    params = optax.apply_updates(state.params, updates)
    average = optax.incremental_update(params, state.ema, 1 - ema) if ema else None
    return TrainState(step=state.step, params=params, opt_state=opt_state, ema=average)

  new = jax.lax.cond(why['not_finite'] | why['spikes'], lambda state: state, update, state)
  rate, skipped = jnp.asarray(lr(state.step), jnp.float32), jnp.sum(~batch['mask'])
  return new.replace(step=state.step + 1), {
    'loss': value,
    'lr': rate,
    'grad_norm': norm,
    'skipped': skipped,
  } | why


def skip_reasons(
  state: TrainState, loss: jax.Array, norm: jax.Array, skip_spikes: float
) -> dict[str, jax.Array]:
  """Why a step of this loss and norm of the gradients is left out, if either is True: on every device the same, as those are.

  A norm is not finite either where its square is beyond float32, from 1.8e19 on: clipping would make nothing of such gradients.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  spike = is_spike(state.opt_state.history, loss, norm, skip_spikes) if skip_spikes else False
  return {'not_finite': ~finite, 'spikes': finite & spike}


def accumulate_gradient(
  params: dict,
  arrays: tuple,
  key: jax.Array,
  *,
  model: nn.Module,
  loss: Callable,
  parts: int,
  specs=None,
  grad_dtype=None,
) -> tuple[jax.Array, dict]:
  """(the weighted sum of the losses of images, targets and weights, its gradient); `params` are shares laid out as `specs`, if
  those are given, of which a block is made whole when its turn comes."""
  if specs is not None:
    model, specs = with_block_gather(model, specs, grad_dtype)

  def part_loss(params, images, targets, weights, key):
    params = params if specs is None else all_gather_params(params, specs, grad_dtype=grad_dtype)
    logits, sown = model.apply(
      {'params': params}, images, train=True, rngs={'dropout': key}, mutable=['drift']
    )
    drift = weights.sum() * sum(
      jax.tree.leaves(sown)
    )  # Of running statistics: its gradient, at no value.
    return jnp.sum(weights * loss(logits, targets)) + (drift - jax.lax.stop_gradient(drift))

  return sum_over_microbatches(jax.value_and_grad(part_loss), parts, params, arrays, key)


def with_block_gather(
  model: nn.Module, specs: dict, grad_dtype: str = 'float32'
) -> tuple[nn.Module, dict]:
  """The model for a device that holds shares of the parameters, laid out as `specs`: it makes each block whole when its turn
  comes. With it the specs of what is left to be made whole before: all, where there are no stacked blocks."""
  if 'Transformer' not in specs:
    return model, specs
  blocks = specs['Transformer']['encoderblock']
  left = specs | {
    'Transformer': specs['Transformer']
    | {'encoderblock': jax.tree.map(lambda _: PartitionSpec(), blocks)}
  }
  if not any('fsdp' in spec for spec in jax.tree.leaves(blocks)):
    return model, left
  one = jax.tree.map(
    lambda spec: PartitionSpec(*spec[1:]), blocks
  )  # Without the depth, which is never split.
  gather = lambda block: {
    'params': all_gather_params(
      block['params'], one, cast=model.config.dtype, grad_dtype=grad_dtype
    )
  }
  return model.clone(gather=gather), left


def sum_over_microbatches(
  function: Callable, parts: int, params: dict, arrays: tuple[jax.Array, ...], key: jax.Array
):
  """`function(params, *arrays, key)` summed over `parts` slices of the arrays' rows, one after another, to save memory.

  Part i takes rows i, i + parts, …: each device's share of a part is then among its own rows, and nothing moves.
  """
  if parts == 1:
    return function(params, *arrays, key)
  split = [x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1) for x in arrays]

  def add(total, part):
    i, part = part
    return jax.tree.map(jnp.add, total, function(params, *part, jax.random.fold_in(key, i))), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(function, params, *(x[0] for x in split), key),
  )
  return jax.lax.scan(add, zeros, (jnp.arange(parts), split))[0]


def predict_logits(params: dict, images: jax.Array, *, model: nn.Module) -> jax.Array:
  """Images [b, h, w, 3] -> logits [b, k]: all that an evaluator knows of a model."""
  return model.apply({'params': params}, images)


def predict_logits_sharded(
  params: dict, images: jax.Array, *, model: nn.Module, specs: dict
) -> jax.Array:
  """`predict_logits` on a device for its own images, from its shares of the parameters, laid out as `specs`."""
  model, left = with_block_gather(model, specs)
  return predict_logits(all_gather_params(params, left), images, model=model)


def compute_features_sharded(
  params: dict, images: jax.Array, *, model: nn.Module, specs: dict
) -> jax.Array:
  """Images [b, h, w, 3] -> what the head reads [b, d], as `predict_logits_sharded` makes the logits."""
  model, left = with_block_gather(model, specs)
  sown = model.apply({'params': all_gather_params(params, left)}, images, mutable=['features'])[1]
  return sown['features']['features'][0].astype(jnp.float32)
