"""The loop: a config and a directory in, a trained model out. Pre-training and fine-tuning are this one function."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices as wait_for_all

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.run_directory import check_same_run, write_run_description
from vit_jax.config import Config, due, labelled_batch_size, parse_duration, total_steps
from vit_jax.config_checks import validate
from vit_jax.data.fingerprint import fingerprint_data
from vit_jax.data.loader import eval_batches, max_bad_examples, train_batches
from vit_jax.data.sources import Source
from vit_jax.errors import DivergedError, UserError
from vit_jax.evaluate.protocols import examiner, open_all
from vit_jax.evaluate.subject import Subject
from vit_jax.metrics.step_log import StepLog, open_step_log
from vit_jax.metrics.writer import (
  MetricsWriter,
  Stopwatch,
  evaluation_records,
  format_metrics,
  plot_curves,
  probe_records,
  steps_of_records,
)
from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
from vit_jax.runtime.crash_log import CrashLog
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.sharding.fsdp import shard_map_sums, state_shardings, state_specs, unsharded_params
from vit_jax.sharding.mesh import (
  Mesh,
  batch_sharding,
  describe_mesh,
  make_any_host,
  make_mesh,
  peak_flops,
  replicated,
)
from vit_jax.step import TrainState, abstract_params, predict_logits_sharded
from vit_jax.training.setup import (
  compile_train_step,
  host_kwargs,
  open_sources,
  prefetch_to_device,
  restore_or_init_state,
  sharded_batch_sizes,
)
from vit_jax.training.task import make_task

SCHEDULE_SETTINGS = ('log_every', 'eval_every', 'probe_every', 'save_every', 'keep_every')


def train(
  config: Config,
  workdir: Path,
  *,
  stopping: Preemption | None = None,
  watchdog: Watchdog | None = None,
) -> dict[str, float]:
  """Trains to the end, going on from what `workdir` holds, and returns the last evaluation.

  UserError, before anything is written, where the config, the data and the directory do not go together. Where `stopping` is
  told so, it saves and exits with that one's exit code.
  """
  began = time.monotonic()
  config = validate(config)
  stopping, watchdog = stopping or Preemption(), watchdog or Watchdog()
  watchdog.set_timeouts(step=config.step_timeout, slow=config.first_step_timeout)

  def should_stop(result) -> bool:
    watchdog.step_done(result)
    return stopping.should_stop()

  task = make_task(config)
  train_source, eval_source = open_sources(config)
  judge = open_all(
    config.probes, train_source.label_names, dir=config.data.dir, l2=config.fewshot_l2
  )
  steps, epoch = (
    total_steps(config, examples := len(train_source.labelled)),
    examples / labelled_batch_size(config.data),
  )
  every = {
    name: parse_duration(getattr(config, name), name=name, steps=steps, epoch=epoch)
    for name in SCHEDULE_SETTINGS
  }
  facts = fingerprint_data(train_source, eval_source)
  check_same_run(workdir, config, train_source.label_names, facts)

  model = task.build(train_source.classes)
  lr = make_lr_schedule(config.optim, steps=steps, epoch=epoch)
  tx = make_optimizer(config.optim, lr, abstract_params(model, config.data.size))
  mesh = make_mesh(config.mesh.fsdp, batches=sharded_batch_sizes(config))
  failures = CrashLog(workdir, host=jax.process_index())
  watchdog.on_hang = failures.write_crash
  with failures.record_errors():
    checkpoints = CheckpointManager(
      workdir, keep=config.max_to_keep, keep_every=every['keep_every']
    )
    state, notes = restore_or_init_state(config, checkpoints, model=model, tx=tx, mesh=mesh)
    first = int(state.step)
    failures.register_start(first)
    done = {'eval_every': evaluation_records(workdir), 'probe_every': probe_records(workdir)}
    owed = [
      name
      for name in done
      if first and due(first, every[name], steps) and first not in steps_of_records(done[name])
    ]
    wait_for_all(
      'restored'
    )  # Before anybody writes: all of them have to go on from the same checkpoint.
    write_run_description(workdir, config, train_source.label_names, facts)
    checkpoints.acquire_directory()
    metrics = MetricsWriter(workdir, step=first, steps=steps, write=jax.process_index() == 0)
    metrics.say(
      f'{workdir}: {format_run_summary(config, model, state)}, {describe_mesh(mesh)}, steps {first} to {steps}'
    )
    for note in [*notes, *unsharded_params(state.params, mesh)]:
      metrics.say(f'  {note}')

    batches = train_batches(
      train_source, config.data, seed=config.seed, start=first, **host_kwargs()
    )
    batches = prefetch_to_device(batches, config.data.prefetch, mesh)
    ledger = open_step_log(config, workdir, metrics, train_source, step=first)
    update = compile_train_step(
      config, model=model, tx=tx, lr=lr, mesh=mesh, state=state, labels=train_source.most_labels
    )
    update = functools.partial(update, seed=np.int32(config.seed))
    shapes = abstract_params(model, config.data.size)
    alive = {'asked': should_stop, 'progress': lambda images: watchdog.arm_slow()}
    subject = Subject(
      model=task.judged(train_source.classes), shapes=shapes, mesh=mesh, data=config.data, **alive
    )
    metrics.say(f'  ready to step after {time.monotonic() - began:.0f} s')
    stopping.start_saving(make_any_host(mesh))
    state, stopped = train_loop(
      state,
      batches,
      range(first + 1, steps + 1),
      every=every,
      owed=owed,
      update=update,
      evaluate={
        'eval_every': make_evaluator(
          config, eval_source, model=model, mesh=mesh, state=state, asked=should_stop
        ),
        'probe_every': examiner(judge, subject),
      },
      speed=functools.partial(throughput_metrics, config, model, mesh),
      checkpoints=checkpoints,
      ledger=ledger,
      metrics=metrics,
      watchdog=watchdog,
      should_stop=should_stop,
    )
    watchdog.arm_slow()
    ledger.settle()
    checkpoints.finish(state, int(state.step))
    if stopped:
      metrics.say(
        f'stopped and saved after step {int(state.step)}/{steps}: the same command goes on from there'
      )
    metrics.close()
    if ledger.hopeless:
      raise DivergedError(ledger.hopeless)
  if stopped:
    raise SystemExit(stopping.exit_code)
  stopping.stop_saving()
  return finish_run(workdir, metrics, seconds=time.monotonic() - began)


def train_loop(
  state: TrainState,
  batches: Iterator[tuple[np.ndarray, dict[str, jax.Array]]],
  steps: range,
  *,
  every: dict[str, int],
  owed: list[str],
  update: Callable,
  evaluate: dict[str, Callable[[dict], dict[str, float] | None]],
  speed: Callable[[float], dict[str, float]],
  checkpoints: CheckpointManager,
  ledger: StepLog,
  metrics: MetricsWriter,
  watchdog: Watchdog,
  should_stop: Callable[[dict], bool],
) -> tuple[TrainState, bool]:
  """Takes the steps; the last state, and whether it was told to stop. `owed`: clocks of evaluations that were left out."""
  watch, last = Stopwatch(), steps.stop - 1

  def evaluated(name: str, step: int) -> bool:
    watchdog.arm_slow()
    with watch.paused(state):
      result = evaluate[name](state.eval_params)
    if result:
      metrics.record(step, result)
      metrics.say(f'step {step}/{last}  ' + format_metrics(result))
    return result is not None

  if not all(evaluated(name, steps.start - 1) for name in owed):
    return state, True
  for step, (ids, batch) in zip(steps, batches, strict=False):
    checkpoints.check_for_errors()
    state, values = update(state, batch)
    ledger.add(step, values, ids)
    stop = should_stop(values)
    if due(step, every['log_every'], step if stop else last):
      ledger.settle()
      values = speed(watch.lap() / ledger.steps)
      values = ledger.record() | values
      metrics.record(step, values)
      metrics.progress(step, values)
    for name in evaluate:
      stop = stop or (due(step, every[name], last) and not evaluated(name, step))
    if due(step, every['save_every'], last) and not stop:
      watchdog.arm_slow()
      with watch.paused(state):
        ledger.settle()
        checkpoints.save(state, step)
    if stop or ledger.hopeless:
      return state, stop
  return state, False


def make_evaluator(
  config: Config,
  source: Source,
  *,
  model: nn.Module,
  mesh: Mesh,
  state: TrainState,
  asked: Callable[[dict], bool],
) -> Callable[[dict], dict[str, float] | None]:
  """Parameters -> {'test_accuracy', …} over the whole evaluation split, whose name comes first; None where `asked`, which is
  given each batch's counts, says to stop."""
  specs, task = state_specs(state.params, mesh), make_task(config)
  from_shares = functools.partial(predict_logits_sharded, model=model, specs=specs)
  counts = shard_map_sums(functools.partial(task.count, predict=from_shares), mesh, specs)
  counts.__name__ = 'count'
  counts = jax.jit(
    counts,
    in_shardings=(state_shardings(state, mesh).params, batch_sharding(mesh)),
    out_shardings=replicated(mesh),
  )

  def evaluate(params: dict) -> dict[str, float] | None:
    counted = []
    for _, batch in prefetch_to_device(
      eval_batches(source, config.data, **host_kwargs()), config.data.prefetch, mesh
    ):
      with jax.set_mesh(mesh):
        counted.append(counts(params, batch))
      if asked(counted[-1]):
        return None
    result = task.means(counted)
    result |= (
      {'skipped': len(source) - result['examples']} if config.data.bad_images == 'skip' else {}
    )
    if (skipped := result.get('skipped', 0)) > (most := max_bad_examples(config.data, len(source))):
      raise UserError(
        f'{skipped} images of {source.split} can not be read, and config.data.max_bad_fraction allows {most}'
      )
    return {f'{source.split}_{name}': value for name, value in result.items()}

  return evaluate


def throughput_metrics(
  config: Config, model: nn.Module, mesh: Mesh, seconds_per_step: float
) -> dict[str, float]:
  """Images and steps, and the share of the chips' peak that the model's own arithmetic takes (a step is three forwards)."""
  values = {
    'images_per_second': config.data.batch / seconds_per_step,
    'seconds_per_step': seconds_per_step,
  }
  if peak := peak_flops(mesh):
    values['mfu'] = 3 * model.shape.flops(config.data.size) * values['images_per_second'] / peak
  return values


def format_run_summary(config: Config, model: nn.Module, state: TrainState) -> str:
  """The run in half a line."""
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  size = 'x'.join(map(str, config.data.size))
  return f'{config.model.variant} with {count:,} parameters, {config.data.train} at {size}, batch {config.data.batch}'


def finish_run(workdir: Path, metrics: MetricsWriter, *, seconds: float) -> dict[str, float]:
  """Draws the curves and says how the run ended; the last evaluation."""
  if jax.process_index():
    return {}
  last, curves = evaluation_records(workdir)[-1], plot_curves(workdir)
  metrics.say(f'done in {seconds:.0f} s: {format_metrics(last)}; see {curves}')
  return last
