"""Trace a run without its data, devices and parameters, and describe it."""

import dataclasses

from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.data.dataset_sizes import DATASET_SIZES
from vit_jax.data.sources import open_source, resolve_split
from vit_jax.errors import UserError
from vit_jax.settings.fields import flatten_config
from vit_jax.sharding.mesh import first_device
from vit_jax.training.program import (
  Program,
  abstract_state,
  abstract_teacher,
  forward_flops,
  lower_train_step,
  make_program,
  training_flops,
)
from vit_jax.training.setup import count_elements
from vit_jax.training.task import make_task
from vit_jax.training.teacher import describe_teacher


def dry_run(config: Config) -> list[str]:
  """Return lines about a run: model, steps, epochs, FLOPs, and each setting.

  The train step is traced for one device, so that an error in it is found. Raises UserError if the
  config is not valid, or if the data is not here and its size is not known.
  """
  config = validate(config)
  examples, classes, labels = data_dimensions(config)
  one_device = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=1))
  program = make_program(
    one_device,
    make_task(config),
    examples=examples,
    classes=classes,
    label_slots=labels,
    devices=first_device(),
    teacher=describe_teacher(config, classes),
  )
  lower_train_step(program)
  data, forward = config.data, forward_flops(config, program.model)
  flops = training_flops(config, program.model, data.batch, program.teacher)
  size = 'x'.join(map(str, data.size))
  return [
    f'model     {config.model.variant} at {size}, '
    f'{count_elements(abstract_state(program).params):,} parameters, {classes:,} classes',
    f'data      {data.train} {data.split}, {examples:,} examples, batch {data.batch:,}',
    f'length    {program.steps:,} steps, {program.steps / program.epoch:,.1f} epochs',
    f'FLOPs     {forward / 1e9:.2f} G for a forward pass of an image, {flops / 1e12:.1f} T for a '
    f'step, {flops * program.steps / 1e18:.3g} exaFLOPs for the run',
    *describe_teacher_cost(program),
    *(f'config.{name}={value}' for name, value in flatten_config(config).items()),
  ]


def describe_teacher_cost(program: Program) -> list[str]:
  """Return a line about the teacher, if there is one."""
  if program.teacher is None:
    return []
  name, count = program.teacher.config.variant, count_elements(abstract_teacher(program))
  flops = forward_flops(program.config, program.teacher)
  cost = f'{flops / 1e9:.2f} G of the FLOPs of a step for an image'
  return [f'teacher   {name}, {count:,} parameters, {cost}']


def data_dimensions(config: Config) -> tuple[int, int, int]:
  """Return (labelled examples, classes, label slots).

  They are those of the data if it is here, else the published ones.
  """
  data = config.data
  try:
    source = open_source(data.train, data.split, dir=data.dir)
    examples, classes, labels = len(source), source.classes, source.max_labels
  except UserError:
    if data.train not in DATASET_SIZES:
      raise
    known = DATASET_SIZES.get(f'{data.train} {data.split}', DATASET_SIZES[data.train])
    examples, classes, labels = known
    if '[' in data.split:  # The table has the training split.
      lengths = {data.split.partition('[')[0]: [examples]}
      spans = resolve_split(data.split, lengths, data.train)
      examples = sum(stop - start for _, start, stop in spans)
  return (
    examples,
    classes,
    classes if data.unlabelled else labels,
  )  # A mixture's say something of each class.
