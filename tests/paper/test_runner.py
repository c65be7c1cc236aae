"""Each run is executed once, resumes after a kill, and records its settings and device."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.paper.runner_worker import FIRST, SECOND
from vit_jax.errors import UserError
from vit_jax.paper import runner
from vit_jax.paper.runner import (
  RECORD_COLUMNS,
  execute_runs,
  final_value,
  measure_values,
  read_records_csv,
  select_best_candidate,
  update_csv,
  write_records_csv,
)
from vit_jax.paper.runs import (
  format_run_command,
  run_candidates,
  run_digest,
  run_workdir,
  sweep_candidates,
)

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name('runner_worker.py')


def start(root: Path, out: Path) -> subprocess.Popen:
  """Start runner_worker.py on one simulated device."""
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '',
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
  }
  words = [sys.executable, str(WORKER), str(root), str(out)]
  return subprocess.Popen(words, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_resumes_and_its_records_equal_those_without_a_kill(tmp_path):
  root, complete, killed = tmp_path / 'runs', tmp_path / 'complete.csv', tmp_path / 'killed.csv'
  process = start(root, killed)
  saved = run_workdir(FIRST, root) / 'checkpoints' / '12'  # Half of its steps.
  while not saved.is_dir() and process.poll() is None:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not killed.exists() and not (run_workdir(SECOND, root) / 'result.json').exists()
  for place, out in ((root, killed), (tmp_path / 'other', complete)):
    process = start(place, out)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
  numbers = lambda path: [
    {name: row[name] for name in RECORD_COLUMNS if name != 'hours'}
    for row in read_records_csv(path)
  ]
  assert numbers(killed) == numbers(complete)


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """Return (root directory, records) of the two runs."""
  root = tmp_path_factory.mktemp('runs')
  return root, execute_runs([FIRST, SECOND], root)


def test_a_record_has_the_settings_digest_and_device_of_its_run(records):
  _, (first, second) = records
  assert (first['row'], first['metric'], first['steps'], first['seed']) == (
    'first',
    'accuracy',
    24,
    0,
  )
  assert first['digest'] == run_digest(FIRST) != second['digest']
  assert (
    'configs/mini.py:ViT-S,digits model.width=16' in first['config']
    and 'optim.lr=0.0001' in second['config']
  )
  assert 'cpu' in first['device'] and float(first['hours']) > 0
  assert 0 <= float(second['value']) <= 1


def test_a_complete_run_is_not_repeated(records):
  root, before = records
  written = (run_workdir(SECOND, root) / 'metrics.jsonl').stat().st_mtime_ns
  assert execute_runs([SECOND], root) == before[1:]
  assert (run_workdir(SECOND, root) / 'metrics.jsonl').stat().st_mtime_ns == written


def test_a_csv_gains_the_missing_runs_and_loses_those_of_another_design(tmp_path, monkeypatch):
  trained = []

  def execute(runs, root):
    trained.extend(runs)
    return [dict.fromkeys(RECORD_COLUMNS, '1') | {'metric': 'accuracy'} | facts(runs[0])]

  facts = lambda run: {'row': run.row, 'column': run.column, 'digest': run_digest(run)}
  monkeypatch.setattr(runner, 'execute_runs', execute)
  twin = dataclasses.replace(FIRST, row='the same run in another table')
  path, other = tmp_path / 'mini_a.csv', tmp_path / 'mini_b.csv'
  write_records_csv([dict.fromkeys(RECORD_COLUMNS, '1')], path)  # Of no run of this table.
  update_csv(path, [FIRST, SECOND], [FIRST], tmp_path)
  assert [row['row'] for row in read_records_csv(path)] == ['first']
  update_csv(path, [FIRST, SECOND], [FIRST, SECOND], tmp_path)
  update_csv(other, [twin], [twin], tmp_path)
  assert [row['row'] for row in read_records_csv(path)] == ['first', 'second']
  assert [row['row'] for row in read_records_csv(other)] == [twin.row]
  assert trained == [FIRST, SECOND]  # The run of the other table is read from the first CSV.


def test_a_missing_measure_is_an_error_that_names_the_recorded_ones(records):
  root, _ = records
  with pytest.raises(UserError, match="recorded no 'imagenet_5shot', but .*test_accuracy"):
    execute_runs([dataclasses.replace(FIRST, measures=('imagenet_5shot',))], root)


def test_the_best_rate_on_held_out_examples_is_taken(tmp_path):
  run = dataclasses.replace(
    FIRST,
    settings=FIRST.settings | {'data.split': 'train', 'steps': 8},
    learning_rates=(1e-5, 1e-2),
    held_out_from='80%',
  )
  chosen = select_best_candidate(run, tmp_path)
  tried = [final_value(result_of(each, tmp_path), 'accuracy') for each in sweep_candidates(run)]
  assert chosen.settings['optim.lr'] == run.learning_rates[tried.index(max(tried))]
  assert chosen.learning_rates == ()


def test_another_recipe_takes_part_in_the_sweep_with_its_own_rate():
  settings = {'seed': 1, 'data.split': 'train'}
  run = dataclasses.replace(
    FIRST,
    settings=settings,
    learning_rates=(1e-5, 1e-2),
    held_out_from='80%',
    alternative_config='configs/bit_finetune.py:R50x1,cifar10',
  )
  *rates, rule = run_candidates(run)
  assert [(way.config, way.settings) for way in rates] == [
    (FIRST.config, settings | {'optim.lr': rate}) for rate in run.learning_rates
  ]
  assert (rule.config, rule.settings, rule.build_config().optim.lr) == (
    run.alternative_config,
    settings,
    0.003,
  )
  held_out = sweep_candidates(run)[-1].build_config().data
  assert (held_out.train, held_out.split, held_out.eval_split) == (
    'tfds:cifar10',
    'train[:80%]',
    'train[80%:]',
  )


def result_of(run, root: Path) -> dict:
  import json

  return json.loads((run_workdir(run, root) / 'result.json').read_text(encoding='utf-8'))


def test_a_sweep_evaluates_on_a_held_out_end_of_every_split():
  run = dataclasses.replace(
    FIRST,
    settings=FIRST.settings | {'data.split': 'train+test'},
    learning_rates=(0.1, 0.2),
    held_out_from='90%',
  )
  for each, rate in zip(sweep_candidates(run), run.learning_rates, strict=True):
    data = each.build_config().data
    assert (data.split, data.eval_split, data.eval) == (
      'train[:90%]+test[:90%]',
      'train[90%:]+test[90%:]',
      'builtin:digits',
    )
    assert each.build_config().optim.lr == rate
  with pytest.raises(UserError, match=r'train\[:400\]'):
    sweep_candidates(dataclasses.replace(FIRST, learning_rates=(0.1,), held_out_from='90%'))


def test_the_digest_changes_with_every_setting_that_a_number_depends_on():
  changed = lambda **settings: run_digest(
    dataclasses.replace(FIRST, settings=FIRST.settings | settings)
  )
  assert changed(log_every='7') == changed(save_every='1') == run_digest(FIRST)
  assert len({run_digest(FIRST), changed(seed=1), changed(eval_every='4'), run_digest(SECOND)}) == 4
  other = dataclasses.replace(
    SECOND, init=dataclasses.replace(FIRST, settings=FIRST.settings | {'seed': 1})
  )
  assert run_digest(other) != run_digest(SECOND)  # It starts from something else.


def test_the_command_of_a_run_starts_from_the_directory_of_the_previous_run():
  line = format_run_command(SECOND, Path('runs/tables'))
  assert line.startswith(
    'python -m vit_jax train --config=configs/mini.py:ViT-S,digits --config.model.width=16'
  )
  assert f'--config.init=runs/tables/{run_digest(FIRST)}' in line and line.endswith(
    f'--workdir=runs/tables/{run_digest(SECOND)}'
  )
  assert "'--config.data.split=train[:400]'" in line


def test_values_are_found_by_the_end_of_their_names():
  result = {
    'digest': '',
    'config': '',
    'records': [
      {'step': 1, 'test_accuracy': 0.1, 'test_accuracy_top5': 0.2},
      {'step': 2, 'fewshot/digits_5shot': 0.3},
    ],
  }
  assert measure_values(result, 'accuracy') == [(1, 0.1)] and measure_values(
    result, 'digits_5shot'
  ) == [(2, 0.3)]
