"""The training loop. Pre-training and fine-tuning are this one function."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import Config
from vit_jax.errors import StorageError
from vit_jax.evaluate.predictions import save_predictions
from vit_jax.metrics.curves import plot_curves
from vit_jax.metrics.records import format_metrics
from vit_jax.metrics.step_log import StepLog
from vit_jax.runtime.cluster import is_lost_host_error
from vit_jax.runtime.crash_log import CrashLog
from vit_jax.runtime.files import summarize_error
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.profiler import Profiler
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.sharding.mesh import make_largest
from vit_jax.step import TrainState
from vit_jax.training.evaluation import Evaluations
from vit_jax.training.initial_head import InitialHead
from vit_jax.training.initial_state import restore_or_init_state
from vit_jax.training.program import compile_train_step
from vit_jax.training.setup import Run, make_profiler, set_up, start_run


def train(
  config: Config,
  workdir: Path,
  *,
  preemption: Preemption | None = None,
  watchdog: Watchdog | None = None,
  probe_head: bool = True,
) -> dict[str, float]:
  """Train to the last step, from the newest checkpoint in `workdir`. Return the last evaluation.

  Raises UserError, before anything is written, if config, data and `workdir` do not go together. On
  preemption the run saves, and exits with the exit code of `preemption`. Without `probe_head`, a
  head that starts as a linear probe is not evaluated.
  """
  preemption, watchdog = preemption or Preemption(), watchdog or Watchdog()
  should_stop = functools.partial(end_step, preemption, watchdog)
  run = set_up(config, workdir, watchdog)
  with (
    open_checkpoints(run, watchdog) as checkpoints,
    record_crashes(workdir, watchdog) as crash_log,
    contextlib.ExitStack() as files,
  ):
    head = InitialHead(run, watchdog, evaluate=probe_head)
    state, counters, notes = restore_or_init_state(run.program, checkpoints, head)
    crash_log.register_start(int(state.step))
    log = start_run(run, state, checkpoints, counters, notes)
    files.callback(log.close_files)
    head.write_metrics(log.writer)
    evaluations = Evaluations(run, log, counters, should_stop=should_stop, watchdog=watchdog)
    profiler = make_profiler(run, log, watchdog)
    files.callback(profiler.close)
    files.callback(watchdog.arm_slow)  # Called first: to write a trace may take long.
    state, step, stop = take_steps(
      run,
      state,
      checkpoints=checkpoints,
      log=log,
      evaluations=evaluations,
      profiler=profiler,
      preemption=preemption,
      watchdog=watchdog,
    )
    save_checkpoint(checkpoints.finish, state, step, log, evaluations, watchdog)
    close_run(run, log, step, stopped=stop)
  if stop:
    raise SystemExit(preemption.exit_code)
  preemption.stop_saving()
  return finish_run(run, log, evaluations)


def take_steps(
  run: Run,
  state: TrainState,
  *,
  checkpoints: CheckpointManager,
  log: StepLog,
  evaluations: Evaluations,
  profiler: Profiler,
  preemption: Preemption,
  watchdog: Watchdog,
) -> tuple[TrainState, int, bool]:
  """Take the steps after `state`. Log, evaluate, trace and save when it is due.

  Return (the last state, its step, whether the run has to stop).
  """
  step = int(state.step)
  train_step, batches = compile_train_step(run.program), log.time_batches(run.batches(step))
  constants = run.constants
  log.writer.print_line(f'  ready to step after {time.monotonic() - run.began:.0f} s')
  preemption.start_saving(make_largest(run.program.mesh))
  stop = not evaluations.run_missed(state)
  log.start_steps(step)
  while step < run.steps and not (stop or log.abort_error):
    requested = preemption.take_trace_request()
    with profiler.trace_step(step + 1, state, requested=requested):
      ids, batch = next(batches)
      checkpoints.check_for_errors()
      state, metrics = train_step(state, batch, **constants)
    step += 1
    log.append(step, metrics, ids)
    profiler.end_step(step, state)
    if (stop := end_step(preemption, watchdog, metrics)) or run.is_due('log_every', step):
      log.write_summary(step)
    stop = stop or not evaluations.run_due(state, step)
    if run.is_due('save_every', step) and not stop:
      save_checkpoint(checkpoints.save, state, step, log, evaluations, watchdog)
  return state, step, stop


def end_step(preemption: Preemption, watchdog: Watchdog, result) -> bool:
  """Tell the watchdog that the step or batch that computes `result` was started.

  Return whether the run has to stop.
  """
  watchdog.step_done(result)
  return preemption.should_stop()


@jax.profiler.annotate_function
def save_checkpoint(
  write: Callable[[TrainState, int, dict], None],
  state: TrainState,
  step: int,
  log: StepLog,
  evaluations: Evaluations,
  watchdog: Watchdog,
):
  """Log the steps up to `step`, and `write` the state with the counters.

  The records are written first: these steps are not taken again. This does not count as training
  time.
  """
  watchdog.arm_slow()
  with log.stopwatch.paused(state):
    log.flush()
    log.writer.flush()
    log.goodput.flush()
    write(state, step, log.counters | evaluations.counters)


@contextlib.contextmanager
def open_checkpoints(run: Run, watchdog: Watchdog) -> Iterator[CheckpointManager]:
  """Yield the manager of the checkpoints in the directory of a run.

  After an error, a checkpoint that is being written is completed. Without one of its hosts it
  cannot be.
  """
  max_to_keep, keep_every = run.config.max_to_keep, run.every['keep_every']
  checkpoints = CheckpointManager(run.workdir, max_to_keep=max_to_keep, keep_every=keep_every)
  try:
    yield checkpoints
  except BaseException as error:
    if not is_lost_host_error(error):
      watchdog.arm_slow()
      checkpoints.finish_pending()
    raise


@contextlib.contextmanager
def record_crashes(workdir: Path, watchdog: Watchdog) -> Iterator[CrashLog]:
  """Record an error inside the context, and what the watchdog finds, in `workdir`."""
  crash_log = CrashLog(workdir, host=jax.process_index())
  watchdog.on_hang = crash_log.write_crash
  with crash_log.record_errors():
    yield crash_log


def close_run(run: Run, log: StepLog, step: int, *, stopped: bool):
  """Close the log of a run that has saved its last state.

  Raises the error of the log if the run had to end early.
  """
  if stopped:
    log.writer.print_line(
      f'stopped and saved after step {step}/{run.steps}: the same command resumes the run'
    )
  log.write_goodput(step, complete=step == run.steps and not (stopped or log.abort_error))
  log.close()


def finish_run(run: Run, log: StepLog, evaluations: Evaluations) -> dict[str, float]:
  """Draw the curves of a complete run, print its last evaluation and return it.

  Its predictions are saved if it took place in this process.
  """
  result = evaluations.last
  if jax.process_index() == 0:
    seconds = time.monotonic() - run.began
    try:
      curves = f'see {plot_curves(run.workdir)}'
    except OSError as error:
      curves = f'curves.png could not be written: {summarize_error(error)}'
    try:
      save_predictions(run.workdir, evaluations.last_rows, run.steps)
    except (OSError, StorageError) as error:
      log.writer.print_line(f'predictions.npz could not be written: {summarize_error(error)}')
    log.writer.print_line(f'done in {seconds:.0f} s: {format_metrics(result)}; {curves}')
  return result
