"""The main job as a person starts it: real processes, real signals, one host or several.

And what two runs have to agree in.
"""

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
# Seconds, on a machine that others use too. What is promised in seconds is measured, not waited
# for.
PATIENCE = 600


class Run:
  """The job in `workdir`, on `hosts` of `devices` each.

  Every process leads its own session, and so its own process group.
  """

  def __init__(self, workdir: Path, *flags: str, hosts: int = 1, devices: int = 2, start: int = 0):
    command = [
      sys.executable,
      '-u',
      'run_pretrain.py',
      '--config=tests/tiny.py',
      f'--workdir={workdir}',
      *flags,
    ]
    self.logs = [workdir.with_name(f'{workdir.name}-{start}-host{i}.log') for i in range(hosts)]
    self.processes, coordinator = [], f'localhost:{free_port()}'
    for i, log in enumerate(self.logs):
      said = host_environment(coordinator, hosts, i, devices=devices)
      env = (
        os.environ
        | ENVIRONMENT
        | (said if hosts > 1 else {name: said[name] for name in ('XLA_FLAGS', 'JAX_PLATFORMS')})
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
    return self.logs[host].read_text()

  def until(self, pattern: str, host: int = 0):
    """Waits until a host has said something. AssertionError where it has ended instead."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, self.text(host)):
      assert self.processes[host].poll() is None or re.search(pattern, self.text(host)), self.text(
        host
      )[-3000:]
      assert time.monotonic() < deadline, f'not said: {pattern}\n{self.text(host)[-3000:]}'
      time.sleep(0.005)

  def send(self, number: int, host: int = 0, *, group: bool = False):
    """A signal, to the process or to all that it has started, too.

    One that has ended meanwhile does not hear it.
    """
    with contextlib.suppress(ProcessLookupError):
      (os.killpg if group else os.kill)(self.processes[host].pid, number)

  def workers(self, host: int = 0) -> list[int]:
    """The processes that make a host's batches."""
    children = Path(f'/proc/{self.processes[host].pid}/task').glob('*/children')
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return [
      pid
      for pid in pids
      if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text(encoding='utf-8')
    ]

  def codes(self) -> list[int]:
    """Waits until all have ended; their exit codes, as a shell says them."""
    codes = [process.wait(timeout=PATIENCE) for process in self.processes]
    return [128 - code if code < 0 else code for code in codes]


def finished(workdir: Path, *flags: str, start: int = 99, **shape):
  """Runs the job to its end."""
  with Run(workdir, *flags, start=start, **shape) as run:
    codes = run.codes()
    assert not any(codes), (codes, *(run.text(i)[-3000:] for i in range(len(codes))))


def stopped_at(text: str) -> int:
  """The step that a run says it has stopped and saved after."""
  return int(re.search(r'stopped and saved after step (\d+)/', text)[1])


def account(workdir: Path) -> dict:
  """Return what must be the same, however often a run was interrupted.

  A digest of every leaf of the last state, the loss of each step to the bit and its examples, and
  the evaluations.
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
  """Their records."""
  records = map(json.loads, lines(workdir / 'metrics.jsonl'))
  return [record for record in records if 'test_accuracy' in record]
