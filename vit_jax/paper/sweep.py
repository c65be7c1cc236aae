"""Choose settings on a held-out part of the training data, then train with them on all of it.

    ROOT/DIGEST    a run of each point of the grid without the held-out examples, and the last run

A complete run is not repeated, and an interrupted one is resumed. The evaluation data of the config
are read by the last run alone, once, after its last step.
"""

import dataclasses
import math
from pathlib import Path

import jax

from vit_jax.config import Config
from vit_jax.data.held_out import name_parts
from vit_jax.errors import DivergedError, UserError, one_line
from vit_jax.paper.runner import final_value, load_or_train
from vit_jax.paper.runs import ExperimentRun, run_digest, run_workdir
from vit_jax.runtime.cluster import print_on_first_host
from vit_jax.runtime.files import write_atomically
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.training.setup import open_sources

_FAILURE_FILE = 'failed.txt'  # In the directory of a run that diverged, and would again.
# Probes may read test images, and only the last evaluation is compared.
_WITHOUT_PROBES = {
  'probes': (), 'probe_every': Config().probe_every, 'fewshot_l2': Config().fewshot_l2,
  'eval_every': '0',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
  """The outcome of a point of the grid on the held-out examples."""

  run: ExperimentRun  # On all training examples.
  directory: Path
  accuracy: float = math.nan
  loss: float = math.nan
  hours: float = 0.0
  failure: str = ''


def sweep(
  runs: list[ExperimentRun],
  root: Path,
  *,
  percent: float,
  preemption: Preemption | None = None,
  watchdog: Watchdog | None = None,
) -> tuple[list[Point], ExperimentRun, dict]:
  """Return (the outcome of each run, the best run, the result of the best on all training data).

  Args:
    runs: the points of the grid; `row` is the name of a point.
    root: directory of the runs.
    percent: size of the held-out part of each class.
    preemption: asks the current run to save and exit with its exit code.
    watchdog: ends the process if a run hangs.

  Raises UserError if two runs are the same, if all fail, or if the last one diverges.
  """
  options = {'preemption': preemption or Preemption(), 'watchdog': watchdog or Watchdog()}
  held_out = [hold_out_examples(run, percent) for run in runs]
  check_distinct(held_out)
  open_sources(runs[0].build_config())  # Missing evaluation data are an error now, not at the end.
  points, best = [], runs[0]
  if len(runs) > 1:
    options['preemption'].has_next_stage = True
    for i, (run, candidate) in enumerate(zip(runs, held_out, strict=True)):
      points.append(evaluate_candidate(run, candidate, root, **options))
      print_on_first_host(f'[{i + 1}/{len(runs)}] {run.row}: {describe(points[-1])}')
    best = choose(points)
  else:
    print_on_first_host(f'{best.row}: the only point of the grid, so that nothing is chosen')
  options['preemption'].has_next_stage = False
  print_on_first_host(f'{best.row}: training on all training data')
  return points, best, load_or_train(last_run(best), root, **options, probe_head=False)


def hold_out_examples(run: ExperimentRun, percent: float) -> ExperimentRun:
  """Return the run without a part of its training examples, evaluated on that part.

  Raises UserError if the run does not learn from labels.
  """
  config = run.build_config()
  if config.mask.target:
    raise UserError('a sweep compares accuracies, and config.mask.target trains without classes')
  rest, held_out = name_parts(config.data.split, percent)
  parts = {'data.split': rest, 'data.eval': config.data.train, 'data.eval_split': held_out}
  return dataclasses.replace(run, settings=run.settings | _WITHOUT_PROBES | parts)


def last_run(run: ExperimentRun) -> ExperimentRun:
  """Return the run on all training examples, with one evaluation after its last step."""
  return dataclasses.replace(run, settings=run.settings | {'eval_every': '0'})


def check_distinct(runs: list[ExperimentRun]):
  """Raise UserError if two points of the grid are the same run."""
  names = {}
  for run in runs:
    first = names.setdefault(run_digest(run), run.row)
    if first != run.row:
      raise UserError(f'--grid: {first} and {run.row} are the same run')


def evaluate_candidate(
  run: ExperimentRun, candidate: ExperimentRun, root: Path, **options
) -> Point:
  """Train the run without the held-out examples. A failure of this run alone is an outcome.

  A run that diverged is not repeated. One that ran out of memory is, because other programs may
  have used the device.
  """
  directory = run_workdir(candidate, root)
  point = Point(run=run, directory=directory)
  failed = directory / _FAILURE_FILE
  if failed.is_file():
    return dataclasses.replace(point, failure=failed.read_text(encoding='utf-8').strip())
  try:
    result = load_or_train(candidate, root, **options)
  except DivergedError as error:
    failure = one_line(error)
    if jax.process_index() == 0:
      write_atomically(failed, failure + '\n')
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    failure = 'out of memory: a smaller config.data.batch or config.model.remat=full needs less'
  else:
    return read_outcome(point, result)
  options['preemption'].stop_saving()
  jax.clear_caches()  # Also frees what the failed run had compiled.
  return dataclasses.replace(point, failure=failure)


def read_outcome(point: Point, result: dict) -> Point:
  """Return the point with the last evaluation of its run. A loss of NaN or inf is a failure."""
  records = [record for record in result['records'] if record['kind'] == 'eval']
  accuracy, loss = (
    float(final_value(result | {'records': records}, name)) for name in ('accuracy', 'loss')
  )
  failure = '' if math.isfinite(loss) else f'the loss of the held-out examples is {loss}'
  return dataclasses.replace(
    point, accuracy=accuracy, loss=loss, hours=result['hours'], failure=failure
  )


def choose(points: list[Point]) -> ExperimentRun:
  """Return the run with the highest accuracy; of equal ones that with the lowest loss.

  Raises UserError if all failed.
  """
  succeeded = [point for point in points if not point.failure]
  if not succeeded:
    raise UserError(
      f'all {len(points)} points of the grid failed; the first: {points[0].run.row}: '
      f'{points[0].failure}'
    )
  best = min(succeeded, key=lambda point: (-point.accuracy, point.loss))
  equal = [point for point in succeeded if point.accuracy == best.accuracy]
  if len(equal) > 1:
    unique = sum(point.loss == best.loss for point in equal) == 1
    reason = 'has the lowest loss' if unique else 'is the first of them with the lowest loss'
    names = ' and '.join(point.run.row for point in equal)
    print_on_first_host(f'{names} have the same accuracy; {best.run.row} {reason}')
  return best.run


def describe(point: Point) -> str:
  """Return the outcome in one line."""
  if point.failure:
    return f'failed: {point.failure}'
  return f'accuracy {point.accuracy:.4f}, loss {point.loss:.4f} on the held-out examples'
