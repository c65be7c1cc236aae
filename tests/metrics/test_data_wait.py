"""The time in which devices wait for data is that between the end of a step and its next batch."""

import dataclasses
import threading
import time
import types

import jax
import pytest

from tests.tiny import get_config
from vit_jax.data import loader
from vit_jax.metrics import data_wait
from vit_jax.metrics.data_wait import DataWait
from vit_jax.metrics.records import read_metrics
from vit_jax.train import train


@pytest.fixture
def clock(monkeypatch):
  """Return {'now': seconds}, which the module reads as the time, with events as results."""
  clock = {'now': 0.0}
  time_module = types.SimpleNamespace(monotonic=lambda: clock['now'])
  jax_module = types.SimpleNamespace(
    profiler=jax.profiler, block_until_ready=threading.Event.wait, process_count=lambda: 1
  )
  monkeypatch.setattr(data_wait, 'time', time_module)
  monkeypatch.setattr(data_wait, 'jax', jax_module)
  return clock


def complete(wait: DataWait, step: int, result: threading.Event):
  """End a step, and return when the thread has seen it."""
  result.set()
  deadline = time.perf_counter() + 60
  while wait._completed[0] != step and time.perf_counter() < deadline:
    time.sleep(1e-3)
  assert wait._completed[0] == step


def test_a_device_that_is_faster_than_the_loader_waits_from_its_last_step_to_the_batch(clock):
  wait, results = DataWait(), []

  def batches():  # Each takes 5 s, and each step 2 s.
    while True:
      if results:
        clock['now'] += 2
        complete(wait, len(results), results[-1])
        clock['now'] += 3
      yield object()

  timed = wait.time_batches(batches())
  for _ in range(4):
    next(timed)
    results.append(threading.Event())
    wait.step_dispatched(results[-1])
  results[-1].set()
  assert wait.lap() == 3 * 3
  assert wait.lap() == 0


def test_time_in_which_the_host_does_something_else_is_not_a_wait_for_data(clock):
  wait = DataWait()
  timed = wait.time_batches(iter([1, 2]))
  next(timed)
  result = threading.Event()
  wait.step_dispatched(result)
  complete(wait, 1, result)
  clock['now'] += 100  # An evaluation.
  next(timed)
  assert wait.lap() == 0


def test_a_device_that_is_slower_than_the_loader_never_waits(clock):
  wait, results = DataWait(), []

  def batches():
    while True:
      clock['now'] += 1
      yield object()

  timed = wait.time_batches(batches())
  for step in range(4):
    next(timed)  # The step before is not complete.
    if results:
      complete(wait, step, results[-1])
    results.append(threading.Event())
    wait.step_dispatched(results[-1])
  results[-1].set()
  assert wait.lap() == 0


def test_the_thread_ends_with_the_batches(clock):
  wait = DataWait()
  timed = wait.time_batches(iter([1, 2, 3]))
  next(timed)
  timed.close()
  threads = [thread for thread in threading.enumerate() if thread.name == 'data wait']
  for thread in threads:
    thread.join(60)
  assert not any(thread.is_alive() for thread in threads)


def test_a_run_that_is_starved_says_so_once(tmp_path, monkeypatch, capsys):
  write = loader.write_train_image

  def write_slowly(*args, **kwargs):
    time.sleep(0.05)
    write(*args, **kwargs)

  monkeypatch.setattr(loader, 'write_train_image', write_slowly)
  config = get_config()
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, threads=1, prefetch=1),
    steps=6, eval_every='0', save_every='0',
  )  # fmt: skip
  train(config, tmp_path)
  shares = [record['data_wait'] for record in read_metrics(tmp_path) if 'data_wait' in record]
  assert len(shares) == 6 and all(0 <= share <= 1 for share in shares)
  assert max(shares[1:]) > 0.5  # A batch takes 0.8 s, and a step some milliseconds.
  lines = [line for line in capsys.readouterr().err.splitlines() if 'waited for data' in line]
  assert len(lines) == 1 and 'config.data.workers (now 0)' in lines[0]
