"""The train state that a run starts from.

Its newest checkpoint, else the model of `config.init`, else its seed.
"""

import jax

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import Config, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.lora import join_adapters, split_adapters
from vit_jax.pretrained.adapt import adapt_params, format_changes
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.sharding.mesh import shard_from_host
from vit_jax.step import TrainState
from vit_jax.training.initial_head import InitialHead
from vit_jax.training.program import Program, abstract_state, make_init_fn


def restore_or_init_state(
  program: Program, checkpoints: CheckpointManager, head: InitialHead | None = None
) -> tuple[TrainState, dict, list[str]]:
  """Return (the state to start from, the counters saved with it, lines for the screen).

  `head` is needed if `config.init_head` is 'probe', and checks the classes if it is 'keep'.

  Raises UserError if every checkpoint is corrupt, or holds another architecture than the config, or
  if the model of `config.init` does not fit the config.
  """
  config, shapes = program.config, abstract_state(program)
  if restored := checkpoints.restore(shapes):
    state, counters = restored
    return state, counters, [f'resumes after step {int(state.step)}']
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  state = jax.jit(make_init_fn(program), out_shardings=shardings)(config.seed)
  if not config.init:
    return state, {}, []
  pretrained = load(config.init, size='native')  # So that positions are resampled once.
  assumptions = check_init_model(config, pretrained)
  base, adapters = split_adapters(state.params)
  params, changes = adapt_params(
    pretrained.params,
    base,
    grid=program.model.shape.grid(config.data.size),
    old_grid=pretrained.grid,
    method=config.init_positions,
    keep_head=config.init_head == 'keep',
  )
  params, head_lines = shard_from_host(join_adapters(params, adapters), shardings.params), []
  if head and config.init_head == 'keep':
    head.check_classes(pretrained)
  if head and config.init_head == 'probe':
    params, line = head.fit(params)
    head_lines = [line]
  ema = jax.tree.map(jax.numpy.copy, params) if config.optim.ema else None
  lines = [
    f'starts from {pretrained.source}',
    *pretrained.notes,
    *assumptions,
    *format_changes(changes),
    *head_lines,
  ]
  return state.replace(params=params, ema=ema), {}, lines


def check_init_model(config: Config, pretrained: PretrainedModel) -> list[str]:
  """Compare the settings of `config.init` with those of `config.model`.

  Returns a line for each setting that differs from what the format of the file usually means, or
  for another interpolation than the file states.
  Raises UserError, with the flags to add, if the file states that it was trained with others.
  """
  stated, chosen = pretrained.config, config.model
  names = ['channels', 'gelu', 'norm_eps', 'mean', 'scale']
  if stated.has_rope or chosen.has_rope:  # No array shows these.
    names += ['position', 'rope_theta', 'rope_grid', 'rope_register_theta']
  if stated.swiglu and chosen.swiglu:
    names.remove('gelu')
  differ = [name for name in names if getattr(stated, name) != getattr(chosen, name)]
  if known := [name for name in differ if name not in pretrained.assumed]:
    flags = ' '.join(f'--config.model.{name}={_format_setting(stated, name)}' for name in known)
    raise UserError(
      f'config.init={config.init!r} was trained with other settings than config.model has: add '
      f'{flags}'
    )
  lines = [
    f'{name} {_format_setting(chosen, name)}; such files usually have '
    f'{_format_setting(stated, name)}'
    for name in differ
  ]
  own, steps = config.data.interpolation, pretrained.preprocessing
  if steps.interpolation != own and 'interpolation' not in pretrained.assumed:
    lines.append(
      f'images are resized with {own}, and those of config.init with {steps.interpolation}: '
      f'--config.data.interpolation={steps.interpolation} does the same'
    )
  return lines


def _format_setting(model: ModelConfig, name: str) -> str:
  value = getattr(model, name)
  return ','.join(f'{v:g}' for v in value) if isinstance(value, tuple) else str(value)
