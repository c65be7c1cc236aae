"""Traces of steps, which TensorBoard's profile plugin shows.

    WORKDIR/tensorboard/plugins/profile/steps_FIRST-LAST/hostI.xplane.pb, hostI.trace.json.gz

A trace has the operations of the devices, under jit_train_step, and the main functions of the host:
next_batch, StepLog.write_summary, Evaluations.run_due, save_checkpoint. Each of its steps is named
'train' with its number. The devices are idle when a trace starts, and it ends when they have
computed its last step, so that it has these steps and no other.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from vit_jax.runtime.files import summarize_error
from vit_jax.runtime.screen import print_stderr

REQUESTED_STEPS = 5  # Steps of a trace that SIGUSR1 requests.
_ENDINGS = ('.xplane.pb', '.trace.json.gz')  # Of the files that JAX writes, after the host's name.

Pause = Callable[[object], contextlib.AbstractContextManager]


class Profiler:
  """Traces the steps of a config, and further steps on request. All hosts trace the same steps.

  A trace that fails is reported, and ends no run.
  """

  def __init__(
    self, logdir: Path, steps: range, *, end: int, pause: Pause, report: Callable[[str], None]
  ):
    """Trace `steps` of a run of `end` steps into the directory of its TensorBoard files.

    `pause(arrays)` is entered while a trace starts or is written. It waits for the arrays first.
    """
    self._logdir, self._steps, self._end = logdir, steps, end
    self._pause, self._report = pause, report
    self._traced: range | None = None  # The steps of the trace that is being recorded.
    self._last = 0  # The last step that was taken while recording.
    self._folder = ''

  def trace_step(
    self, step: int, arrays, *, requested: bool = False
  ) -> contextlib.AbstractContextManager:
    """Return the context in which to take `step`; start a trace before it if one is due.

    `arrays` are the state before the step.
    """
    if self._traced is None and (requested or step in self._steps):
      count = REQUESTED_STEPS if requested else self._steps.stop - step
      with self._pause(arrays):
        self._start(range(step, min(step + count, self._end + 1)))
    if self._traced is None:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def end_step(self, step: int, arrays):
    """Write the trace if `step`, which computes `arrays`, is its last."""
    if self._traced is None:
      return
    self._last = step
    if step >= self._traced[-1]:
      with self._pause(arrays):
        self._stop()

  def close(self):
    """Write the trace of a run that ends before the last step of the trace."""
    if self._traced is not None:
      self._stop()

  def _start(self, steps: range):
    if steps.start in self._steps:
      self._steps = range(0)  # They are traced once, or not at all.
    try:
      # Not in the run directory: JAX would create one that was removed.
      self._folder = tempfile.mkdtemp(prefix='vit_jax_trace_')
      options = jax.profiler.ProfileOptions()
      # Otherwise each Python call of the threads that decode images is recorded, which slows them
      # down and exceeds the million events that the JSON may have.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._folder, profiler_options=options)
    except Exception as error:  # Such as another trace in this process.
      self._report_failure(steps, error)
      shutil.rmtree(self._folder, ignore_errors=True)
    else:
      self._traced, self._last = steps, steps.start - 1

  def _stop(self):
    steps, self._traced = range(self._traced.start, self._last + 1), None
    try:
      jax.profiler.stop_trace()
      if steps:  # An error may have ended the first step.
        target = publish_trace(Path(self._folder), self._logdir, steps, jax.process_index())
        self._report(f'traced {_format_steps(steps)} into {target}')
    except Exception as error:  # A full disk, or a driver that refuses to be traced.
      self._report_failure(steps, error)
    shutil.rmtree(self._folder, ignore_errors=True)

  def _report_failure(self, steps: range, error: Exception):
    report = self._report if jax.process_index() == 0 else print_stderr
    report(f'no trace of {_format_steps(steps)}: {summarize_error(error)}')


def _format_steps(steps: range) -> str:
  return f'steps {steps.start} to {steps.stop - 1}' if len(steps) > 1 else f'step {steps.start}'


def publish_trace(folder: Path, logdir: Path, steps: range, host: int) -> Path:
  """Copy the files that JAX wrote to `folder` to where TensorBoard looks, and return that folder.

  An earlier trace of the same steps stays. Raises OSError if the run directory is gone.
  """
  files = [path for path in folder.rglob('*') if path.name.endswith(_ENDINGS)]
  if not files:
    raise OSError('JAX wrote no files')
  name = f'steps_{steps.start}-{steps.stop - 1}'
  target, copies = logdir / 'plugins' / 'profile' / name, 1
  while (target / f'host{host}{_ENDINGS[0]}').exists():
    copies += 1
    target = target.with_name(f'{name}_{copies}')
  for directory in (logdir, logdir / 'plugins', target.parent, target):
    directory.mkdir(exist_ok=True)  # Not with parents, for a run directory that was removed.
  for path in files:
    ending = next(ending for ending in _ENDINGS if path.name.endswith(ending))
    part = target / f'.host{host}{ending}.part'
    shutil.copyfile(path, part)
    part.replace(target / f'host{host}{ending}')
  return target
