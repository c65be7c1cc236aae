"""Set-up of a run before any parameter exists: its data, its program and its schedules."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.run_directory import (
  adopt_unrecorded_settings,
  check_same_run,
  without_credentials,
  write_run_description,
)
from vit_jax.config import Config
from vit_jax.config_checks import parse_step_range, validate
from vit_jax.data.class_names import normalize_class_name
from vit_jax.data.fingerprint import fingerprint_data
from vit_jax.data.loader import train_batches
from vit_jax.data.mixture import MixtureSource, open_mixture
from vit_jax.data.prefetch import host_kwargs, prefetch_to_device
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.protocols import ProtocolFn, make_protocols
from vit_jax.metrics.goodput import GoodputLog
from vit_jax.metrics.memory import measure_memory
from vit_jax.metrics.step_log import StepLog, open_step_log
from vit_jax.metrics.trackers import check_trackers
from vit_jax.metrics.writer import MetricsWriter
from vit_jax.optim.durations import due, labelled_batch_size, parse_duration, total_steps
from vit_jax.optim.losses import balanced_class_weights, weight_classes
from vit_jax.runtime.profiler import Profiler
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.settings.fields import flatten_config
from vit_jax.sharding.fsdp import split_params, unsharded_params
from vit_jax.sharding.mesh import describe_mesh, peak_flops, shard_from_host
from vit_jax.step import TrainState
from vit_jax.training.program import (
  Program,
  abstract_teacher,
  forward_flops,
  make_program,
  training_flops,
)
from vit_jax.training.task import Task, make_task
from vit_jax.training.teacher import Teacher, load_teacher

SCHEDULES = ('log_every', 'eval_every', 'probe_every', 'save_every', 'keep_every')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A validated config with its directory, its opened data and its program."""

  config: Config
  workdir: Path
  train_source: Source | MixtureSource
  eval_source: Source
  probes: ProtocolFn  # What config.probes name, ready to be evaluated.
  every: dict[str, int]  # The settings in SCHEDULES, in steps; 0 means after the last step alone.
  program: Program
  teacher: Teacher | None
  fingerprint: dict[str, object]  # Of data and teacher: a run does not resume with others.
  began: float  # When the process began to set the run up, on the monotonic clock.

  @property
  def steps(self) -> int:
    """Number of steps of the run."""
    return self.program.steps

  @functools.cached_property
  def constants(self) -> dict[str, Any]:
    """Arguments of every step: the seed, and a teacher's parameters, split over the devices."""
    constants: dict[str, Any] = {'seed': np.int32(self.config.seed)}
    if self.teacher is None:
      return constants
    shapes = abstract_teacher(self.program)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return constants | {'teacher': shard_from_host(self.teacher.params, shardings)}

  def is_due(self, schedule: str, step: int) -> bool:
    """Return whether what the setting `schedule` schedules happens after `step`.

    The last step has everything.
    """
    return due(step, self.every[schedule], self.steps)

  def batches(self, start: int) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
    """Yield (this host's example ids, the global batch) of each step after `start`, without end."""
    config, data = self.config, self.config.data
    batches = train_batches(
      self.train_source, data, seed=config.seed, start=start, model=config.model, **host_kwargs()
    )
    return prefetch_to_device(batches, data.prefetch, self.program.mesh)


def set_up(config: Config, workdir: Path, watchdog: Watchdog) -> Run:
  """Validate a config, start the time limits of its run, open its data and build its program.

  Raises UserError, before anything is written, if config, data and `workdir` do not go together.
  """
  began, config = time.monotonic(), validate(config)
  config = adopt_unrecorded_settings(config, workdir)
  watchdog.set_timeouts(step=config.step_timeout, slow=config.first_step_timeout)
  task = make_task(config)
  train_source, eval_source = open_sources(config)
  labels, examples = train_source.label_names, len(train_source.labelled)
  teacher = load_teacher(config, labels)
  probes = make_protocols(config.probes, labels, dir=config.data.dir, l2=config.fewshot_l2)
  steps, epoch = total_steps(config, examples), examples / labelled_batch_size(config.data)
  every = parse_schedules(config, steps=steps, epoch=epoch)
  fingerprint = fingerprint_data(train_source, eval_source)
  fingerprint |= teacher.facts if teacher else {}
  check_same_run(workdir, config, labels, fingerprint)
  if jax.process_index() == 0:  # The others write no records.
    check_trackers(config.writers)
  return Run(
    config=config,
    workdir=workdir,
    train_source=train_source,
    eval_source=eval_source,
    probes=probes,
    every=every,
    program=make_program(
      config,
      weight_task(task, train_source, config),
      examples=examples,
      classes=train_source.classes,
      label_slots=train_source.max_labels,
      teacher=teacher.model if teacher else None,
    ),
    teacher=teacher,
    fingerprint=fingerprint,
    began=began,
  )


def parse_schedules(config: Config, *, steps: int, epoch: float) -> dict[str, int]:
  """Return the settings in SCHEDULES in steps, for a run of `steps` steps and `epoch` an epoch.

  Raises UserError for these, and for a trace of steps that the run does not have.
  """
  if (profiled := parse_step_range(config.profile)).stop > steps + 1:
    raise UserError(
      f'config.profile={config.profile!r} ends with step {profiled.stop - 1}, and the run has '
      f'{steps} steps'
    )
  return {
    name: parse_duration(getattr(config, name), name=name, steps=steps, epoch=epoch)
    for name in SCHEDULES
  }


def weight_task(task: Task, source: Source | MixtureSource, config: Config) -> Task:
  """Return the task with `config.class_weights` in its loss.

  Raises UserError if the source does not list its labels.
  """
  if config.class_weights == 'none':
    return task
  counts = source.labelled.class_counts()
  if counts is None:
    raise UserError(
      f"config.class_weights='balanced' needs the number of examples of each class, and "
      f'{config.data.train} states labels only in its records: use a source that '
      'lists them, such as folder:'
    )
  weights = balanced_class_weights(counts)
  return dataclasses.replace(task, loss=weight_classes(task.loss, weights))


def open_sources(config: Config) -> tuple[Source | MixtureSource, Source]:
  """Open the training and the evaluation data.

  Raises UserError if their classes differ, or if unlabelled images have no pseudo-labels yet.
  """
  data = config.data
  train_source = open_source(data.train, data.split, dir=data.dir)
  eval_source = open_source(data.eval or data.train, data.eval_split, dir=data.dir)
  train_names, eval_names = (
    tuple(map(normalize_class_name, source.label_names)) for source in (train_source, eval_source)
  )
  if train_names != eval_names:
    train, test = set(train_names), set(eval_names)
    differ = (
      f'only the first has {sorted(train - test)[:5]}, only the second {sorted(test - train)[:5]}'
    )
    if train == test:
      differ = 'their order differs, because only one has decomposed characters (Unicode NFD)'
    raise UserError(f'{data.train} and {data.eval or data.train} have different classes: {differ}')
  if not data.unlabelled:
    return train_source, eval_source
  mixture = open_mixture(
    train_source, data, seed=config.seed, loss=config.loss, smoothing=config.label_smoothing
  )
  return mixture, eval_source


def start_run(
  run: Run, state: TrainState, checkpoints: CheckpointManager, counters: dict, notes: list[str]
) -> StepLog:
  """Write the description of a run to its directory, print its first lines, and open its log."""
  # No host may write before all have restored: all have to start from the same checkpoint.
  sync_global_devices('restored')
  write_run_description(run.workdir, run.config, run.train_source.label_names, run.fingerprint)
  checkpoints.acquire_directory()
  first, mesh, is_host_0 = int(state.step), run.program.mesh, jax.process_index() == 0
  writer = MetricsWriter(
    run.workdir,
    step=first,
    steps=run.steps,
    write=is_host_0,
    trackers=run.config.writers,
    config=flatten_config(without_credentials(run.config)),
  )
  writer.print_line(
    f'{run.workdir}: {summarize_run(run.program, state)}, {describe_mesh(mesh)}, steps {first} to '
    f'{run.steps}'
  )
  if run.teacher:
    notes = [*notes, *run.teacher.notes]
    if not first:
      flops = forward_flops(run.config, run.teacher.model)
      writer.write_jsonl(0, {'forward_flops': flops}, kind='teacher')
  for note in [*notes, *unsharded_params(state.params, mesh)]:
    writer.print_line(f'  {note}')
  return open_step_log(
    run.config,
    run.train_source,
    writer,
    ids_path=run.workdir / 'ids.jsonl',
    step=first,
    counters=counters,
    goodput=GoodputLog(
      run.workdir,
      step=first,
      steps=run.steps,
      began=run.began,
      report=writer.print_line,
      write=is_host_0,
    ),
    measure=functools.partial(measure_step, run.program),
  )


def make_profiler(run: Run, log: StepLog, watchdog: Watchdog) -> Profiler:
  """Return the profiler of a run. Neither its log nor its time limits count what a trace takes."""

  @contextlib.contextmanager
  def pause(arrays):
    watchdog.arm_slow()
    with log.stopwatch.paused(arrays):
      yield

  return Profiler(
    run.workdir / 'tensorboard',
    parse_step_range(run.config.profile),
    end=run.steps,
    pause=pause,
    report=log.writer.print_line,
  )


def summarize_run(program: Program, state: TrainState) -> str:
  """Return model, data and batch of a run in one line."""
  config, count = program.config, count_elements(state.params)
  size = 'x'.join(map(str, config.data.size))
  trained = count_elements(split_params(state.params, program.is_trained)[0])
  share = f' ({trained:,} trained, {100 * trained / count:.2g} %)' if trained < count else ''
  return (
    f'{config.model.variant} with {count:,} parameters{share}, {config.data.train} at {size}, '
    f'batch {config.data.batch}'
  )


def count_elements(params: dict) -> int:
  """Return the number of elements of all arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def measure_step(program: Program, seconds: float) -> dict[str, float]:
  """Return the metrics about speed and memory, for steps of `seconds`. All hosts call it."""
  return measure_throughput(program, seconds) | measure_memory(program.mesh)


def measure_throughput(program: Program, seconds_per_step: float) -> dict[str, float]:
  """Return images per second and, if the chips' peak is known, the model FLOPs utilization (MFU).

  `training_flops` counts a step.
  """
  images_per_second = program.config.data.batch / seconds_per_step
  values = {'images_per_second': images_per_second, 'seconds_per_step': seconds_per_step}
  if peak := peak_flops(program.mesh):
    flops = training_flops(program.config, program.model, images_per_second, program.teacher)
    values['mfu'] = flops / peak
  return values
