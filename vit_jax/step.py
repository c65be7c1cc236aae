"""What is trained, one update of it, and one prediction. Shapes: b batch, h w image, m labels of an example, k classes."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.data.augment import mixup
from vit_jax.losses import multi_hot


@flax.struct.dataclass
class TrainState:
  """All that a run carries from step to step, and all that a checkpoint holds."""

  step: jax.Array  # Updates done, int32.
  params: dict
  opt_state: optax.OptState
  ema: dict | None  # A moving average of the parameters, where one is asked for.

  @property
  def best(self) -> dict:
    """The parameters to evaluate and to hand on."""
    return self.params if self.ema is None else self.ema


def abstract_params(model: nn.Module, size: tuple[int, int]) -> dict:
  """The shapes of the model's parameters for images of `size`."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3), jnp.uint8)))['params']


def init_state(
  seed: int, *, model: nn.Module, tx: optax.GradientTransformation, size: tuple[int, int], ema: bool
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
  seed: int,
  mixup_alpha: float = 0.0,
  accumulate: int = 1,
  ema: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from {'image': uint8 [b, h, w, 3], 'label': int [b, m], 'mask': bool [b]}.

  The loss is the mean over the examples that the mask keeps. Every random number is a function of `seed` and the step.
  `lr` is the schedule in `tx`, for the record.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  images, targets = batch['image'], multi_hot(batch['label'], model.classes)
  if mixup_alpha:
    images, targets = mixup(jax.random.fold_in(key, 0), images, targets, mixup_alpha)
  weights = batch['mask'] / jnp.maximum(batch['mask'].sum(), 1)

  def part_loss(params, images, targets, weights, key):
    logits = model.apply({'params': params}, images, train=True, rngs={'dropout': key})
    return jnp.sum(weights * loss(logits, targets))

  value, grads = sum_of_parts(jax.value_and_grad(part_loss), accumulate, state.params, (images, targets, weights), key)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  average = optax.incremental_update(params, state.ema, 1 - ema) if ema else None
  metrics = {
    'loss': value,
    'lr': jnp.asarray(lr(state.step), jnp.float32),
    'grad_norm': optax.tree.norm(grads),
    'skipped': jnp.sum(~batch['mask']),
  }
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=average), metrics


def sum_of_parts(function: Callable, parts: int, params: dict, arrays: tuple[jax.Array, ...], key: jax.Array):
  """`function(params, *arrays, key)` summed over `parts` slices of the arrays' rows, one after another, to save memory.

  Part i takes rows i, i + parts, …: each device's share of a part is then among its own rows, and nothing moves.
  """
  if parts == 1:
    return function(params, *arrays, key)
  split = [x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for x in arrays]

  def add(total, part):
    i, part = part
    return jax.tree.map(jnp.add, total, function(params, *part, jax.random.fold_in(key, i))), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, params, *(x[0] for x in split), key))
  return jax.lax.scan(add, zeros, (jnp.arange(parts), split))[0]


def predict(params: dict, images: jax.Array, *, model: nn.Module) -> jax.Array:
  """Images [b, h, w, 3] -> logits [b, k]: all that an evaluator knows of a model."""
  return model.apply({'params': params}, images)
