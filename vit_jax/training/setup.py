"""What a run starts from: its examples; and the newest checkpoint of its directory, what `config.init` names, or its seed."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import numpy as np
import optax

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import Config
from vit_jax.data.mixture import MixtureSource, open_mixture
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.pretrained.adapt import adapt_params, format_changes
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import (
  Mesh,
  batch_sharding,
  compiler_options,
  replicated,
  shard_from_host,
  to_global,
)
from vit_jax.step import TrainState, init_state, train_step
from vit_jax.training.task import make_task


def open_sources(config: Config) -> tuple[Source | MixtureSource, Source]:
  """(training, evaluation) examples. UserError where their classes differ, or the unlabelled ones have no labels yet."""
  data = config.data
  train_source = open_source(data.train, data.split, dir=data.dir)
  eval_source = open_source(data.eval or data.train, data.eval_split, dir=data.dir)
  if train_source.label_names != eval_source.label_names:
    ours, theirs = set(train_source.label_names), set(eval_source.label_names)
    raise UserError(
      f'{data.train} and {data.eval or data.train} have different classes: '
      f'only the first has {sorted(ours - theirs)[:5]}, only the second {sorted(theirs - ours)[:5]}'
    )
  if not data.unlabelled:
    return train_source, eval_source
  return open_mixture(
    train_source, data, seed=config.seed, loss=config.loss, smoothing=config.label_smoothing
  ), eval_source


def restore_or_init_state(
  config: Config,
  checkpoints: CheckpointManager,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  mesh: Mesh,
) -> tuple[TrainState, list[str]]:
  """The state to start from, and what to say of it: the newest intact checkpoint, else `config.init`, else a fresh one."""
  init = make_init_fn(config, model=model, tx=tx)
  shapes = abstract_state(config, model=model, tx=tx, mesh=mesh)
  if restored := checkpoints.restore(shapes):
    state, _ = restored
    return state, [f'going on after step {int(state.step)}']
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  state = jax.jit(init, out_shardings=shardings)(config.seed)
  if not config.init:
    return state, []
  released = load(config.init)
  taken = check_init_model(config, released)
  grid = model.shape.grid(config.data.size)
  params, changes = adapt_params(
    released.params, state.params, grid=grid, old_grid=released.grid, method=config.init_positions
  )
  params = shard_from_host(params, shardings.params)
  ema = jax.tree.map(jax.numpy.copy, params) if config.optim.ema else None
  return state.replace(params=params, ema=ema), [
    f'starts from {released.source}',
    *released.notes,
    *taken,
    *format_changes(changes),
  ]


def make_init_fn(
  config: Config, *, model: nn.Module, tx: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
  """The function that makes the state of a run from its seed."""
  return functools.partial(
    init_state, model=model, tx=tx, size=config.data.size, ema=config.optim.ema > 0
  )


def abstract_state(
  config: Config, *, model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """The shapes of a run's state, and where each part lies: nothing is allocated."""
  shapes = jax.eval_shape(make_init_fn(config, model=model, tx=tx), config.seed)
  with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(with_sharding, shapes, state_shardings(shapes, mesh))


def check_init_model(config: Config, released: PretrainedModel) -> list[str]:
  """UserError with the flags to add, where the loaded model is known to compute something else with the same arrays.

  Where that is only assumed of its format, config.model is believed, and the lines say so.
  """
  theirs, ours = released.config, config.model
  text = lambda value: ','.join(f'{v:g}' for v in value) if isinstance(value, tuple) else str(value)
  differ = [
    name
    for name in ('gelu', 'norm_eps', 'mean', 'scale')
    if getattr(theirs, name) != getattr(ours, name)
  ]
  if known := [name for name in differ if name not in released.assumed]:
    flags = ' '.join(f'--config.model.{name}={text(getattr(theirs, name))}' for name in known)
    raise UserError(
      f'config.init={config.init!r} was trained in another way than config.model says: add {flags}'
    )
  return [
    f'{name} {text(getattr(ours, name))}, where such files usually have {text(getattr(theirs, name))}'
    for name in differ
  ]


def sharded_batch_sizes(config: Config) -> dict[str, int]:
  """The sizes that must divide over the devices, by the name of their setting."""
  part = 'config.data.batch' + (
    ' / config.optim.grad_accum_steps' if config.optim.grad_accum_steps > 1 else ''
  )
  sizes = {part: config.data.batch // config.optim.grad_accum_steps}
  return sizes | (
    {'config.data.eval_batch': config.data.eval_batch} if config.data.eval_batch else {}
  )


def host_kwargs() -> dict[str, int]:
  """Which of how many hosts this is, as the loader wants it."""
  return {'host': jax.process_index(), 'hosts': jax.process_count()}


def compile_train_step(
  config: Config,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  lr: optax.Schedule,
  mesh: Mesh,
  state: TrainState,
  labels: int,
) -> jax.stages.Compiled:
  """`train_step`, of (state, batch, seed=), compiled for this run's shapes, once: a batch of another is an error, not a second
  program. The seed is no constant in it: runs that differ in nothing else share one in the cache."""
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    lr=lr,
    loss=make_task(config).loss,
    mixup_alpha=config.mixup,
    grad_accum_steps=config.optim.grad_accum_steps,
    ema=config.optim.ema,
    skip_spikes=config.optim.skip_spikes,
    mesh=mesh,
    grad_dtype=config.optim.grad_dtype,
  )
  step.__name__ = 'train_step'  # What profiles and compilation events call it.
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  shardings, b = state_shardings(state, mesh), config.data.batch
  label = np.float32 if config.data.unlabelled else np.int32
  shapes = {
    'image': ((b, *config.data.size, 3), np.uint8),
    'label': ((b, labels), label),
    'mask': ((b,), np.bool_),
  }
  batch = {
    name: jax.ShapeDtypeStruct(*shape, sharding=batch_sharding(mesh))
    for name, shape in shapes.items()
  }
  with jax.set_mesh(mesh):  # Kernels ask it what they are compiled for, and how a batch is split.
    return (
      jax.jit(step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)
      .lower(state, batch, seed=np.int32(config.seed))
      .compile(compiler_options(mesh))
    )


def prefetch_to_device(
  batches: Iterator[dict[str, np.ndarray]], ahead: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
  """(this host's ids, the batch as global arrays), `ahead` of them on their way to the device before they are asked for."""
  send = lambda batch: (
    batch['id'],
    to_global({name: array for name, array in batch.items() if name != 'id'}, mesh),
  )
  queue = deque(map(send, itertools.islice(batches, ahead)))
  while queue:
    yield queue.popleft()
    queue.extend(map(send, itertools.islice(batches, 1)))
