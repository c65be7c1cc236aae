"""The same run on one device, on eight, and in two and four real processes over localhost.

Batches, losses, parameters, counts.

Eight devices in one process, four in each of two or two in each of four agree bit for bit: gloo
adds in one order.
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
QUICK = '--xla_backend_optimization_level=0'  # To compile, which is most of the work here.
WORKER = Path(__file__).with_name('equivalence_worker.py')
LAYOUTS = {
  'data': 1,
  'both': 2,
  'fsdp': 8,
}  # Of eight devices: how many share one copy of the parameters.


def start(
  jobs: dict[Path, int], *, processes: int, devices: int, poisoned: bool = False
) -> list[dict]:
  """Trains {a directory: its fsdp} in as many processes with so many devices each.

  What they saw of each directory together.
  """
  listed = next(iter(jobs)).with_name('jobs.json')
  jobs_of = [
    {'workdir': str(workdir), 'fsdp': fsdp, 'poisoned': poisoned} for workdir, fsdp in jobs.items()
  ]
  listed.write_text(json.dumps(jobs_of))
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
  assert not any(codes), logs[codes.index(next(filter(None, codes)))].read_text()[-3000:]
  return [together([Path(f'{workdir}-{i}.json') for i in range(processes)]) for workdir in jobs]


def together(files: list[Path]) -> dict:
  """One account of a run from that of each of its processes, none of which has seen another's rows."""
  seen = [json.loads(file.read_text()) for file in files]
  rows = {key: digest for each in seen for key, digest in each['rows'].items()}
  assert len(rows) == sum(len(each['rows']) for each in seen)
  return seen[0] | {'rows': rows, 'compilations': [each['compilations'] for each in seen]}


def losses(workdir: Path) -> list[float]:
  """Of each step."""
  return [record['loss'] for record in read_metrics(workdir) if 'loss' in record]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
  """Of the last checkpoint: their moving average."""
  return flax.traverse_util.flatten_dict(load_newest_params(workdir)[0], sep='/')


def assert_same(workdir: Path, other: Path):
  """Losses and parameters, bit for bit."""
  assert losses(workdir) == losses(other)
  ours, theirs = parameters(workdir), parameters(other)
  assert ours.keys() == theirs.keys()
  assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


@pytest.fixture(scope='module')
def one(tmp_path_factory) -> tuple[Path, dict]:
  """The run on one device."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  return workdir, start({workdir: 1}, processes=1, devices=1)[0]


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> tuple[Path, dict]:
  """The run in two processes of four devices, over both axes."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  return workdir, start({workdir: LAYOUTS['both']}, processes=2, devices=4)[0]


@pytest.fixture(scope='module')
def eight(tmp_path_factory, two) -> dict[str, tuple[Path, dict]]:
  """The run in one process of eight devices, over both axes.

  And as 'half' the second half of what two processes began.
  """
  directory = tmp_path_factory.mktemp('eight')
  return trained_by_eight(
    {directory / 'both': LAYOUTS['both'], halfway(two[0], directory / 'half'): LAYOUTS['both']}
  )


@pytest.fixture(scope='module')
def eight_otherwise(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
  """The run in one process of eight devices, over one axis."""
  directory = tmp_path_factory.mktemp('eight')
  return trained_by_eight({directory / layout: LAYOUTS[layout] for layout in ('data', 'fsdp')})


def trained_by_eight(jobs: dict[Path, int]) -> dict[str, tuple[Path, dict]]:
  """{the name of a directory: (it, what was seen of it)}."""
  return {
    workdir.name: (workdir, seen)
    for workdir, seen in zip(jobs, start(jobs, processes=1, devices=8), strict=True)
  }


@pytest.fixture(scope='module')
def four(tmp_path_factory) -> tuple[Path, dict]:
  """The run in four processes of two devices, over both axes."""
  workdir = tmp_path_factory.mktemp('four') / 'run'
  return workdir, start({workdir: LAYOUTS['both']}, processes=4, devices=2)[0]


def halfway(whole: Path, copy: Path) -> Path:
  """A copy of a run as it was after its first half."""
  shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(str(CONFIG.steps)))
  return copy


def test_eight_devices_equal_one(one, eight):
  assert_close(eight['both'], one)


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['data', 'fsdp'])
def test_eight_devices_over_one_axis_equal_one(one, eight_otherwise, layout):
  """In one process, without gloo, test_step.py says the same of every layout."""
  assert_close(eight_otherwise[layout], one)
  assert eight_otherwise[layout][1]['result'] == pytest.approx(one[1]['result'], rel=1e-5)
  assert eight_otherwise[layout][1]['compilations'] == [1]


def assert_close(run: tuple[Path, dict], other: tuple[Path, dict]):
  """Losses and parameters to 1e-5, and the batches bit for bit."""
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


def test_every_layout_evaluates_every_example_once_and_counts_alike(one, eight, two, four):
  accounts = [one[1], two[1], four[1], *(seen for _, seen in eight.values())]
  counts = {(seen['result']['test_examples'], seen['result']['test_accuracy']) for seen in accounts}
  assert len(counts) == 1 and counts.pop()[0] == 500  # Not a multiple of 128, nor of 8.


def test_each_process_compiles_the_step_once(one, eight, two, four):
  accounts = [one[1], two[1], four[1], *(seen for _, seen in eight.values())]
  assert [seen['compilations'] for seen in accounts] == [[1], [1, 1], [1, 1, 1, 1], [1], [1]]


def test_what_two_processes_saved_one_process_ends_bit_for_bit_the_same(two, eight):
  assert_same(eight['half'][0], two[0])


@pytest.mark.slow
def test_what_two_processes_saved_four_processes_end_bit_for_bit_the_same(two, tmp_path):
  half = halfway(two[0], tmp_path / 'half')
  start({half: LAYOUTS['both']}, processes=4, devices=2)
  assert_same(half, two[0])


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['data', 'fsdp'])
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_equal_one_in_every_layout(eight_otherwise, tmp_path, layout, processes):
  start({tmp_path / 'run': LAYOUTS[layout]}, processes=processes, devices=8 // processes)
  assert_same(tmp_path / 'run', eight_otherwise[layout][0])
