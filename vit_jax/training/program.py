"""The model, optimizer, mesh and compiled train step of a run.

Training and `plan` share this file, so that what `plan` compiles for a TPU slice is what a run
compiles there.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax

from vit_jax.config import Config, OptimConfig
from vit_jax.data.mixup import make_mix
from vit_jax.models.lora import check_new_head, frozen_paths
from vit_jax.optim.durations import labelled_batch_size, total_steps
from vit_jax.optim.losses import add_teacher
from vit_jax.optim.optimizer import find_trained, make_lr_schedule, make_optimizer
from vit_jax.optim.sharpness import forward_passes, make_sharpness
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import Mesh, batch_sharding, compiler_options, make_mesh, replicated
from vit_jax.step import (
  TrainState,
  abstract_params,
  init_state,
  predict_sharded_logits,
  train_step,
)
from vit_jax.training.eval_size import abstract_eval_params, make_resample
from vit_jax.training.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A validated config together with everything that `train_step` is compiled from."""

  config: Config
  task: Task
  steps: int  # Steps of the run.
  epoch: float  # Steps of an epoch.
  label_slots: int  # The largest number of labels of an example; m in step.py.
  model: nn.Module
  lr: optax.Schedule
  tx: optax.GradientTransformation  # The optimizer.
  is_trained: dict | None  # A tree of bools like the parameters, or None if all are trained.
  mesh: Mesh
  teacher: nn.Module | None = None  # The frozen model of distillation.

  @functools.cached_property
  def param_shapes(self) -> dict:
    """The shapes of the parameters, a tree of `jax.ShapeDtypeStruct`."""
    return abstract_params(self.model, self.config.data.size)

  @functools.cached_property
  def eval_param_shapes(self) -> dict:
    """The shapes of the parameters for evaluation images."""
    return abstract_eval_params(self.config, self.model, self.param_shapes)

  def make_resample(self) -> Callable[[dict], dict]:
    """Return the function that fits sharded parameters to evaluation images."""
    return make_resample(
      self.config, self.model, self.param_shapes, self.eval_param_shapes, self.mesh
    )


def training_flops(
  config: Config, model: nn.Module, images: float, teacher: nn.Module | None
) -> float:
  """Return the FLOPs of training a model on `images` images, counted as often as they are seen.

  A gradient counts as three forward passes; SAM takes two gradients. A teacher adds its forward
  pass.
  """
  flops = forward_passes(config.optim) * forward_flops(config, model)
  return (flops + forward_flops(config, teacher)) * images


def forward_flops(config: Config, model: nn.Module | None) -> float:
  """Return the FLOPs of a forward pass of one image of a run; 0 without a model."""
  return 0 if model is None else model.shape.flops(config.data.size, config.model.channels)


def make_program(
  config: Config,
  task: Task,
  *,
  examples: int,
  classes: int,
  label_slots: int,
  devices: list | None = None,
  teacher: nn.Module | None = None,
) -> Program:
  """Build the program of a validated config and its task.

  `devices` are by default all that JAX finds. `examples` is the number of labelled training
  examples. `teacher` is needed if `config.distill` names one. Raises UserError if the config names
  an unknown model, optimizer or mesh, or a size of evaluation that the model cannot take.
  """
  steps = total_steps(config, examples)
  epoch = examples / labelled_batch_size(config.data)
  model = task.build_model(classes)
  lr = make_lr_schedule(config.optim, steps=steps, epoch=epoch)
  params = abstract_params(model, config.data.size)
  abstract_eval_params(config, model, params)  # Raises the error.
  optim = freeze_base(config, params)
  return Program(
    config=config,
    task=task,
    steps=steps,
    epoch=epoch,
    label_slots=label_slots,
    model=model,
    lr=lr,
    tx=make_optimizer(optim, lr, params),
    is_trained=find_trained(optim, params),
    mesh=make_mesh(config.mesh.fsdp, batches=sharded_batch_sizes(config), devices=devices),
    teacher=teacher,
  )


def freeze_base(config: Config, params: dict) -> OptimConfig:
  """Return the settings of the optimizer, in which adapters freeze all that they do not replace.

  Raises UserError if a new head would never be trained.
  """
  if not config.lora.rank:
    return config.optim
  frozen = frozen_paths(params, config.lora)
  check_new_head(frozen, config)
  return dataclasses.replace(config.optim, freeze='|'.join(map(re.escape, frozen)))


def sharded_batch_sizes(config: Config) -> dict[str, int]:
  """Return the batch sizes that the number of devices must divide, by the name of the setting."""
  parts, eval_batch = config.optim.grad_accum_steps, config.data.eval_batch
  name = 'config.data.batch' + (' / config.optim.grad_accum_steps' if parts > 1 else '')
  sizes = {name: config.data.batch // parts}
  return sizes | ({'config.data.eval_batch': eval_batch} if eval_batch else {})


def make_init_fn(program: Program) -> Callable[[int], TrainState]:
  """Return the function that initializes the train state from a seed."""
  size, ema = program.config.data.size, program.config.optim.ema > 0
  return functools.partial(init_state, model=program.model, tx=program.tx, size=size, ema=ema)


def abstract_state(program: Program) -> TrainState:
  """Return the shapes, dtypes and shardings of the train state. Nothing is allocated."""
  return add_shardings(jax.eval_shape(make_init_fn(program), program.config.seed), program.mesh)


def abstract_teacher(program: Program) -> dict:
  """Return the shapes, dtypes and shardings of the teacher's parameters; {} without a teacher."""
  if program.teacher is None:
    return {}
  return add_shardings(abstract_params(program.teacher, program.config.data.size), program.mesh)


def add_shardings(shapes, mesh: Mesh):
  """Return a tree of shapes with the sharding of each."""

  def with_sharding(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, shapes, state_shardings(shapes, mesh))


def abstract_batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes, dtypes and shardings of a training batch."""
  data, b = program.config.data, program.config.data.batch
  shapes = {
    'image': ((b, *data.size, program.config.model.channels), np.uint8),
    'label': ((b, program.label_slots), np.float32 if data.unlabelled else np.int32),
    'mask': ((b,), np.bool_),
  }
  sharding = batch_sharding(program.mesh)
  return {name: jax.ShapeDtypeStruct(*x, sharding=sharding) for name, x in shapes.items()}


def lower_train_step(program: Program) -> jax.stages.Lowered:
  """Trace and lower `train_step`, as a function (state, batch, seed=) -> (state, metrics).

  A batch of another shape is an error, not a second compilation. The seed is an argument: runs that
  differ in nothing else share a program in the compilation cache. So are the parameters of a
  teacher, `teacher=`.
  """
  config, mesh = program.config, program.mesh
  step: Callable = functools.partial(
    train_step,
    model=program.model,
    tx=program.tx,
    lr=program.lr,
    loss=program.task.loss,
    mix=make_mix(
      mixup_alpha=config.mixup,
      cutmix_alpha=config.cutmix,
      cutmix_probability=config.cutmix_probability,
    ),
    grad_accum_steps=config.optim.grad_accum_steps,
    ema=config.optim.ema,
    skip_spikes=config.optim.skip_spikes,
    is_trained=program.is_trained,
    mesh=mesh,
    grad_dtype=config.optim.grad_dtype,
    sharpness=make_sharpness(config.optim, program.lr),
  )
  step = with_teacher(step, program, program.teacher) if program.teacher else step
  functools.update_wrapper(step, train_step)  # Profiles and compilation events show its name.
  state = abstract_state(program)
  with jax.set_mesh(mesh):  # Kernels ask the mesh for their target and for how a batch is split.
    jitted = jax.jit(
      step,
      out_shardings=(state_shardings(state, mesh), replicated(mesh)),
      donate_argnums=0,  # The new state may overwrite the memory of the old one.
    )
    constants = {'teacher': abstract_teacher(program)} if program.teacher else {}
    return jitted.lower(state, abstract_batch(program), seed=np.int32(config.seed), **constants)


def with_teacher(step: Callable, program: Program, model: nn.Module) -> Callable:
  """Return `step` with the argument `teacher`, the parameters of the teacher `model`."""
  config = program.config
  predict = functools.partial(
    predict_sharded_logits,
    model=model,
    mesh=program.mesh,
    parts=config.optim.grad_accum_steps,
  )
  loss = add_teacher(program.task.loss, config.distill)

  def step_with_teacher(state: TrainState, batch: dict, *, seed: jax.Array, teacher: dict):
    return step(state, batch, seed=seed, loss=loss, teach=functools.partial(predict, teacher))

  return step_with_teacher


def compile_train_step(program: Program) -> jax.stages.Compiled:
  """Compile `train_step` once, as `lower_train_step` describes it."""
  lowered = lower_train_step(program)
  with jax.set_mesh(program.mesh):
    return lowered.compile(compiler_options(program.mesh))
