"""Does runs, each once: what a directory holds whole is taken from there, and what was cut short goes on where it was.

Every number ends in a row of a CSV with its config, commit, seed, steps, device and hours.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import jax

from vit_jax.errors import UserError
from vit_jax.metrics.records import read_metrics
from vit_jax.paper.runs import (
  CHECKOUT_ROOT,
  ExperimentRun,
  format_flag_value,
  init_chain,
  run_candidates,
  run_digest,
  run_workdir,
  sweep_candidates,
)
from vit_jax.sharding.mesh import describe_mesh, make_mesh
from vit_jax.train import train

RECORD_COLUMNS = (
  'row',
  'column',
  'metric',
  'value',
  'steps',
  'seed',
  'hours',
  'device',
  'commit',
  'config',
  'digest',
)


def execute_runs(runs: list[ExperimentRun], root: Path) -> list[dict]:
  """The records of all runs, each of them done first if it isn't yet. A kill loses what came after the last checkpoint."""
  records = []
  for i, run in enumerate(runs):
    for each in [*init_chain(run)][:-1]:
      _load_or_train(each, root)
    chosen = select_best_candidate(run, root) if run.swept else run
    records += _result_to_records(run, _load_or_train(chosen, root))
    print(
      f'[{i + 1}/{len(runs)}] {run.row}, {run.column}: {_format_last_record(records)}',
      file=sys.stderr,
      flush=True,
    )
  return records


def select_best_candidate(run: ExperimentRun, root: Path) -> ExperimentRun:
  """Of its ways the one that is best on the examples held out."""
  accuracy = [final_value(_load_or_train(each, root), 'accuracy') for each in sweep_candidates(run)]
  return run_candidates(run)[accuracy.index(max(accuracy))]


def _load_or_train(run: ExperimentRun, root: Path) -> dict:
  """What result.json of the run's directory holds; the run is done first where it isn't there."""
  where = run_workdir(run, root)
  path = where / 'result.json'
  if not path.is_file():
    config = run.built(
      str(run_workdir(run.init, root)) if isinstance(run.init, ExperimentRun) else run.init
    )
    train(config, where)
    jax.clear_caches()  # Programs of runs that are over.
    settings = ' '.join(
      f'{name}={format_flag_value(value)}' for name, value in run.settings.items() if name != 'seed'
    )
    facts = {
      'config': f'{run.config} {settings}'.strip(),
      'digest': run_digest(run),
      'seed': config.seed,
      'commit': _git_commit(),
    }
    facts |= {'device': describe_mesh(make_mesh(1, batches={})), **_read_run_measurements(where)}
    (where / '.result.json').write_text(json.dumps(facts, indent=1) + '\n')
    (where / '.result.json').replace(path)  # Whole or not at all.
  return json.loads(path.read_text())


def _read_run_measurements(where: Path) -> dict:
  """{'hours' of training, without evaluations, 'records' as metrics.jsonl has them of evaluations}."""
  records, seconds, step = read_metrics(where), 0.0, 0
  for record in records:
    if 'seconds_per_step' in record:
      seconds, step = seconds + record['seconds_per_step'] * (record['step'] - step), record['step']
  return {
    'hours': seconds / 3600,
    'records': [record for record in records if 'seconds_per_step' not in record],
  }


def final_value(result: dict, measure: str) -> float:
  """The last value of a measure."""
  return measure_values(result, measure)[-1][1]


def measure_values(result: dict, measure: str) -> list[tuple[int, float]]:
  """(step, value) of every record that has a measure, 'accuracy' or 'digits_5shot'."""
  found = [
    (record['step'], value)
    for record in result['records']
    for name, value in record.items()
    if _is_measure_name(name, measure)
  ]
  if not found:
    names = sorted({name for record in result['records'] for name in record if name != 'step'})
    raise UserError(
      f'run {result["digest"]} ({result["config"]}) recorded no {measure!r}, but {", ".join(names)}'
    )
  return found


def _is_measure_name(name: str, measure: str) -> bool:
  """'test_accuracy' and 'fewshot/digits_5shot' are of 'accuracy' and 'digits_5shot'."""
  return name == measure or name.endswith(('_' + measure, '/' + measure))


def _result_to_records(run: ExperimentRun, result: dict) -> list[dict]:
  """A row of COLUMNS for every measure of a run and every step at which it was taken."""
  facts = {name: result[name] for name in ('seed', 'device', 'commit', 'config', 'digest')}
  facts |= {'row': run.row, 'column': run.column, 'hours': f'{result["hours"]:.5f}'}
  return [
    facts | {'metric': measure, 'steps': step, 'value': f'{value:.5f}'}
    for measure in run.measures
    for step, value in measure_values(result, measure)
  ]


def _format_last_record(records: list[dict]) -> str:
  """The newest record, for the screen."""
  return f'{records[-1]["metric"]} {float(records[-1]["value"]):.4f} at step {records[-1]["steps"]}'


def _git_commit() -> str:
  """Of the code, with '+' where it differs from it; '' outside a repository."""
  git = lambda *args: subprocess.run(
    ['git', '-C', str(CHECKOUT_ROOT), *args], capture_output=True, text=True, check=False
  ).stdout.strip()
  return git('rev-parse', '--short', 'HEAD') + (
    '+' if git('status', '--porcelain', '--', 'vit_jax', 'configs') else ''
  )


def write_records_csv(records: list[dict], path: Path):
  """As CSV; whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(f'.{path.name}')
  with scratch.open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, RECORD_COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(records)
  scratch.replace(path)


def read_records_csv(path: Path) -> list[dict[str, str]]:
  """What `write_records_csv` wrote."""
  with path.open(newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))
