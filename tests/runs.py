"""Run the training script in real processes, on one host or several, and compare runs."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from vit_jax.checkpoint.io import read_checkpoint_as_numpy
from vit_jax.checkpoint.manager import list_saved_steps
from vit_jax.launch.local import free_port, host_environment

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
  'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'compiled'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'PYTHONPATH': str(ROOT / 'tests' / 'without'),
}
# Seconds to wait before a test fails, generous because other programs may use the machine. Tests of
# promised times measure them.
PATIENCE = 600


class Run:
  """A training job in `workdir` on `hosts` hosts with `devices` devices each.

  Every host is a process with its own session and process group.
  """

  def __init__(self, workdir: Path, *flags: str, hosts: int = 1, devices: int = 2, start: int = 0):
    command = [
      sys.executable,
      '-u',
      'run_pretrain.py',
      '--config=tests/tiny.py',
      '--no-report',
      f'--workdir={workdir}',
      *flags,
    ]
    self.logs = [workdir.with_name(f'{workdir.name}-{start}-host{i}.log') for i in range(hosts)]
    self.processes, coordinator = [], f'localhost:{free_port()}'
    for i, log in enumerate(self.logs):
      own = host_environment(coordinator, hosts, i, devices=devices)
      env = (
        os.environ
        | ENVIRONMENT
        | (own if hosts > 1 else {name: own[name] for name in ('XLA_FLAGS', 'JAX_PLATFORMS')})
      )
      with log.open('w') as file:
        process = subprocess.Popen(
          command,
          env=env,
          cwd=ROOT,
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      self.processes.append(process)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def text(self, host: int = 0) -> str:
    """Return what a host has printed so far."""
    return self.logs[host].read_text(encoding='utf-8')

  def until(self, pattern: str, host: int = 0):
    """Wait until the output of a host matches. Raise AssertionError if the host ends before."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, self.text(host)):
      assert self.processes[host].poll() is None or re.search(pattern, self.text(host)), self.text(
        host
      )[-3000:]
      assert time.monotonic() < deadline, f'not printed: {pattern}\n{self.text(host)[-3000:]}'
      time.sleep(0.005)

  def send(self, number: int, host: int = 0, *, group: bool = False):
    """Send a signal to a host, or to its process group. Ignore a host that has ended."""
    with contextlib.suppress(ProcessLookupError):
      (os.killpg if group else os.kill)(self.processes[host].pid, number)

  def workers(self, host: int = 0) -> list[int]:
    """Return the process ids of a host's data workers."""
    children = Path(f'/proc/{self.processes[host].pid}/task').glob('*/children')
    pids = [int(pid) for file in children for pid in file.read_text(encoding='utf-8').split()]
    return [
      pid
      for pid in pids
      if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text(encoding='utf-8')
    ]

  def codes(self) -> list[int]:
    """Wait until all hosts have ended, and return their exit codes as a shell reports them."""
    codes = [process.wait(timeout=PATIENCE) for process in self.processes]
    return [128 - code if code < 0 else code for code in codes]


def finished(workdir: Path, *flags: str, start: int = 99, **shape):
  """Run the job to its end. Raise AssertionError if it fails."""
  with Run(workdir, *flags, start=start, **shape) as run:
    codes = run.codes()
    assert not any(codes), (codes, *(run.text(i)[-3000:] for i in range(len(codes))))


def stopped_at(text: str) -> int:
  """Return the step after which a run printed that it stopped and saved."""
  return int(re.search(r'stopped and saved after step (\d+)/', text)[1])


def account(workdir: Path) -> dict:
  """Return the results of a run that interruptions must not change.

  These are a digest of every leaf of the last state, the examples and the exact loss of each step,
  and the evaluations.
  """
  step = max(list_saved_steps(workdir / 'checkpoints'))
  leaves = jax.tree.leaves_with_path(read_checkpoint_as_numpy(workdir / 'checkpoints' / str(step)))
  digests = {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    for path, leaf in leaves
  }
  return {
    'step': step,
    'leaves': digests,
    'ids': lines(workdir / 'ids.jsonl'),
    'evaluations': evaluations(workdir),
  }


def lines(path: Path) -> list[str]:
  """Return the lines of a file."""
  return path.read_text(encoding='utf-8').splitlines()


def evaluations(workdir: Path) -> list[dict]:
  """Return the records of the evaluations of a run."""
  records = map(json.loads, lines(workdir / 'metrics.jsonl'))
  return [record for record in records if 'test_accuracy' in record]
