"""The evaluations of a run.

Of the evaluation split, and of the probes of `config.probes`, each on its own schedule.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from vit_jax.data.loader import max_bad_examples
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import Evaluator, PreemptedError, Rows
from vit_jax.evaluate.protocols import make_protocol_evaluator
from vit_jax.metrics.records import format_metrics
from vit_jax.metrics.step_log import StepLog
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.step import TrainState
from vit_jax.training.setup import Run

KINDS = {'eval_every': 'eval', 'probe_every': 'probe'}  # Schedule -> kind of its records.


class Evaluations:
  """Evaluates the parameters of a run when it is due, and records the results."""

  def __init__(
    self,
    run: Run,
    log: StepLog,
    counters: dict,
    *,
    should_stop: Callable[[object], bool],
    watchdog: Watchdog,
  ):
    """Continue with the `counters` of a checkpoint.

    `should_stop` is called with the result of every batch.
    """
    self._run, self._log, self._watchdog = run, log, watchdog
    self.last_rows: Rows = {}  # Of the last evaluation of this process.
    self._resample = run.program.make_resample()
    self._evaluate = {
      'eval_every': make_split_evaluation(run, should_stop, self.last_rows.update),
      'probe_every': make_probe_evaluation(run, should_stop, watchdog),
    }
    self._done_at: dict[str, int] = dict(counters.get('evaluated_at', {}))
    self.last: dict[str, float] = counters.get('last_evaluation', {})  # Of the evaluation split.

  @property
  def counters(self) -> dict:
    """The steps and the result of the last evaluations, which a checkpoint saves."""
    return {'evaluated_at': self._done_at, 'last_evaluation': self.last}

  def run_missed(self, state: TrainState) -> bool:
    """Make up for evaluations that were due after the restored step and were interrupted.

    Return as `run_due` does.
    """
    step = int(state.step)
    return step == 0 or self.run_due(state, step)

  @jax.profiler.annotate_function
  def run_due(self, state: TrainState, step: int) -> bool:
    """Run the evaluations that are due after `step`.

    Return False if the run has to stop before they are done.
    """
    return all(
      self._run_one(name, state, step)
      for name in self._evaluate
      if self._run.is_due(name, step) and self._done_at.get(name) != step
    )

  def _run_one(self, name: str, state: TrainState, step: int) -> bool:
    self._watchdog.arm_slow()
    with self._log.stopwatch.paused(state):
      values = self._evaluate[name](self._resample(state.eval_params))
    if values is None:
      return False
    self._done_at[name] = step
    if name == 'eval_every':
      self.last = {'step': step} | values
    if values:
      self._log.writer.write(step, values, kind=KINDS[name])
      self._log.writer.print_line(f'step {step}/{self._run.steps}  {format_metrics(values)}')
    return True


def make_split_evaluation(
  run: Run, should_stop: Callable[[object], bool], keep_rows: Callable[[Rows], None]
) -> Callable[[dict], dict[str, float] | None]:
  """Return a function params -> {'test_accuracy': ..., ...} over the evaluation split.

  The names begin with the name of the split. The function returns None if `should_stop` does.
  `keep_rows` is called with the rows of all examples.
  """
  program, source, data = run.program, run.eval_source, run.config.data
  evaluator = make_evaluator(run, program.model, should_stop)

  def evaluate(params: dict) -> dict[str, float] | None:
    try:
      rows = evaluator.rows(params, source, program.task.eval_output)
    except PreemptedError:
      return None
    keep_rows(rows)
    result = program.task.aggregate_metrics(rows)
    if data.bad_images == 'skip':
      result['skipped'] = len(source) - result['examples']
      if result['skipped'] > (most := max_bad_examples(data, len(source))):
        raise UserError(
          f'{result["skipped"]} images of {source.split} cannot be read, '
          f'and config.data.max_bad_fraction allows {most}'
        )
    return {f'{source.split}_{name}': value for name, value in result.items()}

  return evaluate


def make_probe_evaluation(
  run: Run, should_stop: Callable[[object], bool], watchdog: Watchdog
) -> Callable[[dict], dict[str, float] | None]:
  """Return a function params -> {'fewshot/digits_5shot': ..., ...} for the probes of the config."""
  model = run.program.task.build_probed_model(run.train_source.classes)
  evaluator = make_evaluator(run, model, should_stop, on_batch=lambda examples: watchdog.arm_slow())
  return make_protocol_evaluator(run.probes, evaluator)


def make_evaluator(
  run: Run, model: nn.Module, should_stop: Callable[[object], bool], **options
) -> Evaluator:
  """Return an evaluator of `model` with parameters of the run that fit its evaluation images."""
  return Evaluator(
    model=model,
    param_shapes=run.program.eval_param_shapes,
    mesh=run.program.mesh,
    data=run.config.data,
    should_stop=should_stop,
    **options,
  )
