"""benchmarks/gpu_all.sh runs to its end on a CPU in tiny sizes, and repeats no part."""

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ('correctness', 'step', 'memory', 'input', 'reproduced', 'mini')


@pytest.fixture
def gpu_all(tmp_path):
  """Return a function that runs the script on a CPU and returns (exit code, output)."""
  env = os.environ | {
    # Programs of a few steps compile for longer than they run.
    'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    'OUT': str(tmp_path / 'out'),
    'WORK': str(tmp_path / 'work'),
    'PYTHON': sys.executable,
    'PYTHONPATH': f'{Path(__file__).parent / "tolerant_torch"}:{ROOT}',
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'compiled'),
  }

  def run(**changes: str) -> tuple[int, str]:
    command = [ROOT / 'benchmarks' / 'gpu_all.sh', '--smoke']
    done = subprocess.run(command, env=env | changes, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr

  return run


@pytest.fixture
def gpu(monkeypatch):
  """Return the module benchmarks/gpu.py."""
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  yield importlib.import_module('gpu')
  for name in ('gpu', 'gpu_sides'):
    del sys.modules[name]


def read_rows(path: Path) -> list[dict[str, str]]:
  with path.open(newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def test_every_part_runs_to_its_end_and_none_is_repeated(gpu_all, tmp_path):
  code, text = gpu_all(TOTAL='500')
  assert code == 0, text
  rows = {kind: read_rows(tmp_path / 'out' / f'{kind}.csv') for kind in KINDS}
  assert all(rows.values())
  checks = {row['check']: row['verdict'] for row in rows['correctness']}
  assert checks['losses, float32'] == checks['xla attention, output'] == 'pass'
  (step,) = rows['step']
  has_timm = all(map(importlib.util.find_spec, ('torch', 'timm')))
  assert step['model'] == 'Ti/16' and float(step['ours_images_per_second']) > 0
  assert (float(step['ratio'] or 0) > 0) == has_timm
  assert float(rows['memory'][0]['ours_planned_gib']) > 0
  assert float(rows['input'][0]['both_images_per_second']) > 0
  assert rows['reproduced'][0]['name'] == 'cifar10-94-fast'
  code, text = gpu_all()
  assert code == 0 and text.count('done before') == 6 and 'at most' not in text
  # A bare machine continues from the tar file alone.
  bare = {'WORK': str(tmp_path / 'bare'), 'STATE': str(tmp_path / 'out' / 'state.tar')}
  code, text = gpu_all(**bare)
  assert code == 0 and text.count('done before') == 6
  assert len([*(tmp_path / 'bare' / 'reproduce').glob('*/result.json')]) == 1


def test_without_time_every_part_is_left_for_the_next_call(gpu_all, tmp_path):
  code, text = gpu_all(TOTAL='0')
  assert code == 75 and text.count('left for the next call') == 12
  with tarfile.open(tmp_path / 'out' / 'state.tar') as state:
    assert not [name for name in state.getnames() if name.endswith('.csv')]


def test_a_result_that_an_earlier_call_missed_is_not_forgotten(gpu_all, tmp_path):
  python = tmp_path / 'python'
  # Every part writes its CSV; one misses its result.
  python.write_text(
    '#!/usr/bin/env bash\n'
    'all=$*\n'
    'while (($#)); do case $1 in --csv) echo x >"$2" ;; --out) out=$2 ;; esac; shift; done\n'
    'if [[ $all == *gpu_reproduce* ]]; then\n'
    '  echo "cifar10-94-fast,x" >"$out/reproduced.csv"; exit 1\n'
    'elif [[ $all == *tables* ]]; then echo x >"$out/mini_positions.csv"; fi\n',
    encoding='utf-8',
  )
  python.chmod(0o755)
  code, text = gpu_all(PYTHON=str(python))
  assert code == 1 and 'failed, or over a limit: cifar10-94-fast' in text
  bare = {'WORK': str(tmp_path / 'bare'), 'STATE': str(tmp_path / 'out' / 'state.tar')}
  for changes in ({}, bare):
    code, text = gpu_all(PYTHON=str(python), **changes)
    assert code == 1 and text.count('done before') == 6
    assert 'failed, or over a limit: cifar10-94-fast' in text


def test_a_miniature_that_has_only_a_part_of_its_rows_is_continued(gpu_all, tmp_path):
  python = tmp_path / 'python'
  python.write_text(
    '#!/usr/bin/env bash\n'
    'all=$*\n'
    'while (($#)); do case $1 in --csv) echo x >"$2" ;; --out) out=$2 ;; esac; shift; done\n'
    'if [[ $all == *gpu_reproduce* ]]; then echo "cifar10-94-fast,x" >"$out/reproduced.csv"; fi\n'
    'if [[ $all == *tables* ]]; then echo x >"$out/mini_positions.csv"; exit 124; fi\n',
    encoding='utf-8',
  )
  python.chmod(0o755)
  for done in (0, 5):
    code, text = gpu_all(PYTHON=str(python))
    assert code == 75 and text.count('done before') == done
    assert 'miniature positions: interrupted' in text


@pytest.mark.parametrize(
  ('seconds', 'expected'),
  [
    ({1: 1.0, 2: 1.5, 4: 3.1, 8: 0.1}, 2),  # 4 is no faster, so that 8 is not tried.
    ({1: 1.0, 2: 1.5, 4: None, 8: 0.1}, 2),
    ({1: 1.0, 2: 1.9, 4: 3.5, 8: 6.0}, 8),
  ],
)
def test_the_search_ends_at_the_batch_that_is_fastest_or_fits(gpu, seconds, expected):
  def measure(side, variant, batch, use):
    assert (side, variant, use) == ('ours', 'B/16', 'search')
    return seconds[batch] and {'seconds': [seconds[batch]]}

  assert gpu.best_batch(measure, 'ours', 'B/16', (1, 2, 4, 8)) == expected


def test_a_measurement_that_is_in_the_file_is_not_repeated(gpu, tmp_path, monkeypatch):
  taken = []

  def take(side, variant, batch, *, smoke):
    taken.append(batch)
    return None if batch == 4 else {'seconds': [0.5]}

  monkeypatch.setattr(gpu, 'measure_in_process', take)
  for _ in range(2):
    measure = gpu.measured_once(tmp_path / 'step.csv.measured', smoke=True)
    assert measure('ours', 'B/16', 2, 'search') == {'seconds': [0.5]}
    assert measure('ours', 'B/16', 4, 'search') is None
  assert taken == [2, 4]


def test_throughput_is_the_flops_of_three_forward_passes_over_the_peak(gpu):
  ours = {'seconds': [0.1, 0.3, 0.2], 'flops': 6e12, 'peak_flops': 1e14, 'peak_gib': 1.5}
  theirs = {'seconds': [0.5], 'peak_gib': None, 'with': 'torch', 'compile_seconds': 7.0}
  ours |= {'with': 'jax', 'compile_seconds': 3.0, 'device': 'GPU'}
  row = gpu.row('B/16', {'ours': 20, 'theirs': 40}, {'ours': ours, 'theirs': theirs})
  assert (row['ours_images_per_second'], row['timm_images_per_second']) == ('100.0', '80.0')
  assert row['ratio'] == '1.250'
  # 0.3 TFLOPs an image at 100 and 80 images a second, of 100 TFLOP/s.
  assert (row['ours_mfu'], row['timm_mfu']) == ('0.3000', '0.2400')
  assert (row['ours_peak_gib'], row['timm_peak_gib']) == ('1.50', '')
