"""A run on one device equals runs on eight devices in one, two and four processes over localhost.

The tests compare batches, losses, parameters and counts. Runs on eight devices agree bit for bit
with any number of processes, because gloo adds in one order.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest

from tests.equivalence_worker import CONFIG
from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.metrics.records import read_metrics

ROOT = Path(__file__).parents[1]
QUICK = '--xla_backend_optimization_level=0'  # Compiling takes most of the time here.
WORKER = Path(__file__).with_name('equivalence_worker.py')
# Number of devices, of eight, that share one copy of the parameters.
LAYOUTS = {'data': 1, 'both': 2, 'fsdp': 8}


def start(
  jobs: dict[Path, int], *, processes: int, devices: int, poisoned: bool = False
) -> list[dict]:
  """Train the jobs {directory: fsdp} in `processes` processes with `devices` devices each.

  Return the merged observations of all processes for each directory.
  """
  listed = next(iter(jobs)).with_name('jobs.json')
  jobs_of = [
    {'workdir': str(workdir), 'fsdp': fsdp, 'poisoned': poisoned} for workdir, fsdp in jobs.items()
  ]
  listed.write_text(json.dumps(jobs_of), encoding='utf-8')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices} {QUICK}',
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  }
  command = lambda i: [sys.executable, str(WORKER), str(port), str(processes), str(i), str(listed)]
  logs = [listed.with_name(f'log-{processes}-{i}.txt') for i in range(processes)]
  running = []
  try:
    for i, log in enumerate(logs):
      with log.open('w') as file:
        running.append(
          subprocess.Popen(command(i), env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        )
    codes = [process.wait(timeout=400) for process in running]
  finally:
    for process in running:
      process.kill()
      process.wait()
  assert not any(codes), logs[codes.index(next(filter(None, codes)))].read_text(encoding='utf-8')[
    -3000:
  ]
  return [merge([Path(f'{workdir}-{i}.json') for i in range(processes)]) for workdir in jobs]


def merge(files: list[Path]) -> dict:
  """Merge the observations of the processes of a run. No two processes have the same row."""
  seen = [json.loads(file.read_text(encoding='utf-8')) for file in files]
  rows = {key: digest for each in seen for key, digest in each['rows'].items()}
  assert len(rows) == sum(len(each['rows']) for each in seen)
  return seen[0] | {'rows': rows, 'compilations': [each['compilations'] for each in seen]}


def losses(workdir: Path) -> list[float]:
  """Return the loss of each step."""
  return [record['loss'] for record in read_metrics(workdir) if 'loss' in record]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
  """Return the moving average of the parameters in the last checkpoint."""
  return flax.traverse_util.flatten_dict(load_newest_params(workdir)[0], sep='/')


def assert_same(workdir: Path, other: Path):
  """Assert that losses and parameters are equal bit for bit."""
  assert losses(workdir) == losses(other)
  ours, theirs = parameters(workdir), parameters(other)
  assert ours.keys() == theirs.keys()
  assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


@pytest.fixture(scope='module')
def one(tmp_path_factory) -> tuple[Path, dict]:
  """Return the run on one device: (directory, observations)."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  return workdir, start({workdir: 1}, processes=1, devices=1)[0]


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> tuple[Path, dict]:
  """Return the run in two processes of four devices, over both axes."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  return workdir, start({workdir: LAYOUTS['both']}, processes=2, devices=4)[0]


@pytest.fixture(scope='module')
def eight(tmp_path_factory, two) -> dict[str, tuple[Path, dict]]:
  """Return two runs in one process of eight devices, over both axes: 'both' and 'half'.

  'half' resumes the run of two processes after its first half.
  """
  directory = tmp_path_factory.mktemp('eight')
  return trained_by_eight(
    {directory / 'both': LAYOUTS['both'], halfway(two[0], directory / 'half'): LAYOUTS['both']}
  )


@pytest.fixture(scope='module')
def eight_otherwise(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
  """Return the runs in one process of eight devices, over one axis."""
  directory = tmp_path_factory.mktemp('eight')
  return trained_by_eight({directory / layout: LAYOUTS[layout] for layout in ('data', 'fsdp')})


def trained_by_eight(jobs: dict[Path, int]) -> dict[str, tuple[Path, dict]]:
  """Return {name of a directory: (directory, observations)}."""
  return {
    workdir.name: (workdir, seen)
    for workdir, seen in zip(jobs, start(jobs, processes=1, devices=8), strict=True)
  }


@pytest.fixture(scope='module')
def four(tmp_path_factory) -> tuple[Path, dict]:
  """Return the run in four processes of two devices, over both axes."""
  workdir = tmp_path_factory.mktemp('four') / 'run'
  return workdir, start({workdir: LAYOUTS['both']}, processes=4, devices=2)[0]


def halfway(workdir: Path, copy: Path) -> Path:
  """Copy a run as it was after its first half."""
  shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns(str(CONFIG.steps)))
  return copy


def test_eight_devices_equal_one(one, eight):
  assert_close(eight['both'], one)


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['data', 'fsdp'])
def test_eight_devices_over_one_axis_equal_one(one, eight_otherwise, layout):
  """test_step.py proves the same for every layout in one process, without gloo."""
  assert_close(eight_otherwise[layout], one)
  assert eight_otherwise[layout][1]['result'] == pytest.approx(one[1]['result'], rel=1e-5)
  assert eight_otherwise[layout][1]['compilations'] == [1]


def assert_close(run: tuple[Path, dict], other: tuple[Path, dict]):
  """Assert that losses and parameters are equal to 1e-5, and batches bit for bit."""
  (workdir, seen), (other_workdir, other_seen) = run, other
  np.testing.assert_allclose(losses(workdir), losses(other_workdir), rtol=1e-5)
  ours, theirs = parameters(workdir), parameters(other_workdir)
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
  assert seen['rows'] == other_seen['rows']
  assert len(seen['rows']) == CONFIG.steps * CONFIG.data.batch


def test_two_processes_equal_one(eight, two):
  assert_same(two[0], eight['both'][0])
  assert two[1]['rows'] == eight['both'][1]['rows']


def test_four_processes_equal_one(eight, four):
  assert_same(four[0], eight['both'][0])
  assert four[1]['rows'] == eight['both'][1]['rows']


def test_every_layout_evaluates_every_example_once_with_the_same_accuracy(one, eight, two, four):
  accounts = [one[1], two[1], four[1], *(seen for _, seen in eight.values())]
  counts = {(seen['result']['test_examples'], seen['result']['test_accuracy']) for seen in accounts}
  assert len(counts) == 1 and counts.pop()[0] == 500  # Not a multiple of 128, nor of 8.


def test_each_process_compiles_the_step_once(one, eight, two, four):
  accounts = [one[1], two[1], four[1], *(seen for _, seen in eight.values())]
  assert [seen['compilations'] for seen in accounts] == [[1], [1, 1], [1, 1, 1, 1], [1], [1]]


def test_one_process_resumes_a_run_of_two_processes_bit_for_bit(two, eight):
  assert_same(eight['half'][0], two[0])


@pytest.mark.slow
def test_four_processes_resume_a_run_of_two_processes_bit_for_bit(two, tmp_path):
  half = halfway(two[0], tmp_path / 'half')
  start({half: LAYOUTS['both']}, processes=4, devices=2)
  assert_same(half, two[0])


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['data', 'fsdp'])
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_equal_one_in_every_layout(eight_otherwise, tmp_path, layout, processes):
  start({tmp_path / 'run': LAYOUTS[layout]}, processes=processes, devices=8 // processes)
  assert_same(tmp_path / 'run', eight_otherwise[layout][0])
