"""Train the runs of an experiment, each once, and record their measurements as rows of a CSV.

A complete run is read from its directory, and an interrupted one is resumed. Each row has the
config, commit, seed, steps, device and hours of its run.
"""

import csv
import json
import subprocess
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

from vit_jax.errors import UserError
from vit_jax.metrics.records import read_metrics
from vit_jax.paper.runs import (
  ExperimentRun,
  format_flag_value,
  init_chain,
  run_candidates,
  run_digest,
  run_workdir,
  sweep_candidates,
)
from vit_jax.runtime.files import escape_formula, write_atomically
from vit_jax.runtime.screen import print_stderr
from vit_jax.sharding.mesh import describe_mesh, make_mesh
from vit_jax.train import train

_CHECKOUT = Path(__file__).parents[2]
RECORD_COLUMNS = (
  'row', 'column', 'metric', 'value', 'steps', 'seed', 'hours', 'device', 'commit',
  'config', 'digest',
)  # fmt: skip


def execute_runs(runs: list[ExperimentRun], root: Path) -> list[dict]:
  """Train the runs that are not complete, and return the records of all.

  If the process is killed, the work since the last checkpoint is lost.
  """
  records = []
  for i, run in enumerate(runs):
    for start in [*init_chain(run)][:-1]:
      load_or_train(start, root)
    chosen = select_best_candidate(run, root) if run.is_swept else run
    records += _result_to_records(run, load_or_train(chosen, root))
    print_stderr(f'[{i + 1}/{len(runs)}] {run.row}, {run.column}: {_format_last_record(records)}')
  return records


def update_csv(path: Path, runs: list[ExperimentRun], due: list[ExperimentRun], root: Path):
  """Train the runs of `due` that no CSV beside `path` has, and write the rows of `runs` to `path`.

  `due` is a part of `runs`. The file is written after every run, and has no rows of other runs.
  """
  recorded = [
    record for file in sorted(path.parent.glob('*.csv')) for record in _read_if_records(file)
  ]
  rows = [row for run in runs for row in find_records(run, recorded)]
  for run in due:
    if not find_records(run, rows):
      rows += execute_runs([run], root)
      write_records_csv(rows, path)
  write_records_csv(rows, path)


def find_records(run: ExperimentRun, records: list[dict]) -> list[dict]:
  """Return the rows of a run from those of all runs with its digest, or [] if one is missing."""
  found = {
    (record['metric'], int(record['steps'])): record | {'row': run.row, 'column': run.column}
    for record in records
    if record['digest'] == run_digest(run) and record['metric'] in run.measures
  }
  return [*found.values()] if {metric for metric, _ in found} == {*run.measures} else []


def _read_if_records(path: Path) -> list[dict[str, str]]:
  """Return the records of a CSV, or [] if it has other columns."""
  records = read_records_csv(path)
  return records if records and tuple(records[0]) == RECORD_COLUMNS else []


def select_best_candidate(run: ExperimentRun, root: Path) -> ExperimentRun:
  """Return the candidate with the highest accuracy on the held-out examples."""
  results = [load_or_train(candidate, root) for candidate in sweep_candidates(run)]
  accuracies = [final_value(result, 'accuracy') for result in results]
  return run_candidates(run)[accuracies.index(max(accuracies))]


def load_or_train(run: ExperimentRun, root: Path, **options) -> dict:
  """Return the result.json of the run's directory. The run is trained first if there is none.

  `options` are those of `train`.
  """
  workdir = run_workdir(run, root)
  path = workdir / 'result.json'
  if not path.is_file():
    init = run.init
    config = run.build_config(
      str(run_workdir(init, root)) if isinstance(init, ExperimentRun) else init
    )
    train(config, workdir, **options)
    jax.clear_caches()  # The next run has other programs.
    settings = ' '.join(
      f'{name}={format_flag_value(value)}' for name, value in run.settings.items() if name != 'seed'
    )
    result = {
      'config': f'{run.config} {settings}'.strip(),
      'digest': run_digest(run),
      'seed': config.seed,
      'commit': git_commit(),
      'device': describe_mesh(make_mesh(1, batches={})),
      **_read_run_measurements(workdir),
    }
    if jax.process_index() == 0:
      write_atomically(path, json.dumps(result, indent=1) + '\n')
    sync_global_devices(f'{path} written')
  return json.loads(path.read_text(encoding='utf-8'))


def _read_run_measurements(workdir: Path) -> dict:
  """Return the 'hours' of training, without evaluations, and the 'records' of evaluations."""
  records, seconds, step = read_metrics(workdir), 0.0, 0
  for record in records:
    if 'seconds_per_step' in record:
      seconds += record['seconds_per_step'] * (record['step'] - step)
      step = record['step']
  evaluations = [record for record in records if record['kind'] in ('eval', 'probe')]
  return {'hours': seconds / 3600, 'records': evaluations}


def final_value(result: dict, measure: str) -> float:
  """Return the last value of a measure."""
  return measure_values(result, measure)[-1][1]


def measure_values(result: dict, measure: str) -> list[tuple[int, float]]:
  """Return (step, value) of every record of a measure, such as 'accuracy' or 'digits_5shot'.

  Raises UserError if the run recorded no such measure.
  """
  values = [
    (record['step'], value)
    for record in result['records']
    for name, value in record.items()
    if _is_measure_name(name, measure)
  ]
  if not values:
    names = sorted({name for record in result['records'] for name in record if name != 'step'})
    raise UserError(
      f'run {result["digest"]} ({result["config"]}) recorded no {measure!r}, but {", ".join(names)}'
    )
  return values


def _is_measure_name(name: str, measure: str) -> bool:
  """Return whether a metric belongs to a measure: 'test_accuracy' belongs to 'accuracy'."""
  return name == measure or name.endswith((f'_{measure}', f'/{measure}'))


def _result_to_records(run: ExperimentRun, result: dict) -> list[dict]:
  """Return a row for every measure of a run and every step at which it was evaluated."""
  facts = {name: result[name] for name in ('seed', 'device', 'commit', 'config', 'digest')}
  facts |= {'row': run.row, 'column': run.column, 'hours': f'{result["hours"]:.5f}'}
  return [
    facts | {'metric': measure, 'steps': step, 'value': f'{value:.5f}'}
    for measure in run.measures
    for step, value in measure_values(result, measure)
  ]


def _format_last_record(records: list[dict]) -> str:
  """Return the newest record as text: 'accuracy 0.9123 at step 200'."""
  last = records[-1]
  return f'{last["metric"]} {float(last["value"]):.4f} at step {last["steps"]}'


def git_commit() -> str:
  """Return the commit of the checkout, with '+' if files differ from it; '' without a checkout."""

  def git(*args: str) -> str:
    command = ['git', '-C', str(_CHECKOUT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

  if not (_CHECKOUT / 'configs').is_dir():  # An installed wheel may lie in another repository.
    return ''
  changed = git('status', '--porcelain', '--', 'vit_jax', 'configs')
  return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')


def write_records_csv(records: list[dict], path: Path):
  """Write records as CSV, atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}')
  with temporary.open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, RECORD_COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(
      {name: escape_formula(cell) for name, cell in record.items()} for record in records
    )
  temporary.replace(path)


def read_records_csv(path: Path) -> list[dict[str, str]]:
  """Read the records that `write_records_csv` wrote; all values are text."""
  with path.open(newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))
