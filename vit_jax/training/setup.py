"""What a run starts from: its examples; and the newest checkpoint of its directory, what `config.init` names, or its seed."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import optax

from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.config import Config
from vit_jax.data.mixture import Mixture, mixture
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.pretrained.adapt import adapt, table
from vit_jax.pretrained.model import Pretrained
from vit_jax.pretrained.released import load
from vit_jax.sharding.mesh import Mesh, spread, state_shardings
from vit_jax.step import TrainState, init_state


def open_sources(config: Config) -> tuple[Source | Mixture, Source]:
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
  return mixture(train_source, data, seed=config.seed, loss=config.loss, smoothing=config.label_smoothing), eval_source


def first_state(
  config: Config, checkpoints: Checkpoints, *, model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, list[str]]:
  """The state to start from, and what to say of it: the newest intact checkpoint, else `config.init`, else a fresh one."""
  init = fresh_state(config, model=model, tx=tx)
  shapes = abstract_state(config, model=model, tx=tx, mesh=mesh)
  if state := checkpoints.restore(shapes):
    return state, [f'going on after step {int(state.step)}']
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  state = jax.jit(init, out_shardings=shardings)(config.seed)
  if not config.init:
    return state, []
  released = load(config.init)
  taken = refuse_other_model(config, released)
  grid = model.shape.grid(config.data.size)
  params, changes = adapt(released.params, state.params, grid=grid, old_grid=released.grid, method=config.init_positions)
  params = spread(params, shardings.params)
  ema = jax.tree.map(jax.numpy.copy, params) if config.optim.ema else None
  return state.replace(params=params, ema=ema), [f'starts from {released.source}', *released.notes, *taken, *table(changes)]


def fresh_state(config: Config, *, model: nn.Module, tx: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
  """The function that makes the state of a run from its seed."""
  return functools.partial(init_state, model=model, tx=tx, size=config.data.size, ema=config.optim.ema > 0)


def abstract_state(config: Config, *, model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """The shapes of a run's state, and where each part lies: nothing is allocated."""
  shapes = jax.eval_shape(fresh_state(config, model=model, tx=tx), config.seed)
  with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(with_sharding, shapes, state_shardings(shapes, mesh))


def refuse_other_model(config: Config, released: Pretrained) -> list[str]:
  """UserError with the flags to add, where the loaded model is known to compute something else with the same arrays.

  Where that is only assumed of its format, config.model is believed, and the lines say so.
  """
  theirs, ours = released.config, config.model
  text = lambda value: ','.join(f'{v:g}' for v in value) if isinstance(value, tuple) else str(value)
  differ = [name for name in ('gelu', 'norm_eps', 'mean', 'scale') if getattr(theirs, name) != getattr(ours, name)]
  if known := [name for name in differ if name not in released.assumed]:
    flags = ' '.join(f'--config.model.{name}={text(getattr(theirs, name))}' for name in known)
    raise UserError(f'config.init={config.init!r} was trained in another way than config.model says: add {flags}')
  return [f'{name} {text(getattr(ours, name))}, where such files usually have {text(getattr(theirs, name))}' for name in differ]
