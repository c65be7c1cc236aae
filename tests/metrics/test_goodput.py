"""Goodput equals hand-computed values, also of runs that are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.runs import ENVIRONMENT, ROOT
from vit_jax.metrics import goodput
from vit_jax.metrics.goodput import GoodputLog, Line, measure_goodput, read_goodput
from vit_jax.metrics.records import read_metrics


class Clock:
  """A clock that a test moves: the wall clock, and a monotonic one that each start resets."""

  def __init__(self, monkeypatch):
    self.now, self.booted = 1.7e9, 1.7e9 - 12345.0
    clocks = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now - self.booted)
    monkeypatch.setattr(goodput, 'time', clocks)

  def pass_time(self, seconds: float):
    self.now += seconds


def start(workdir, clock: Clock, *, resume: int, until: int, steps: int, step_seconds: float):
  """Take steps `resume` + 1 to `until`. Log every 10 steps, and save every 15, in 4 s.

  A start takes 20 s until it is ready. The last step is evaluated, in 30 s.
  """
  began = clock.now - clock.booted
  log = GoodputLog(workdir, step=resume, steps=steps, began=began, report=print)
  clock.pass_time(20.0)
  training = 0.0
  log.record(resume, training)
  for step in range(resume + 1, until + 1):
    clock.pass_time(step_seconds)
    training += step_seconds
    if step % 10 == 0 or step % 15 == 0 or step == steps:
      log.record(step, training)
    if step % 15 == 0:
      clock.pass_time(4.0)
  values = {}
  if until == steps:
    clock.pass_time(30.0)
    values = log.record(steps, training, complete=True)
  log.close()
  return values


def test_a_run_that_was_killed_three_times_has_the_hand_computed_goodput(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  common = {'steps': 100, 'step_seconds': 2.0}
  start(tmp_path, clock, resume=0, until=37, **common)  # Saved after 15 and 30.
  clock.pass_time(60.0)
  start(tmp_path, clock, resume=30, until=58, **common)  # Saved after 45.
  clock.pass_time(600.0)
  start(tmp_path, clock, resume=45, until=49, **common)  # Saved nothing.
  clock.pass_time(5.0)
  values = start(tmp_path, clock, resume=45, until=100, **common)
  # Steps taken: 37, 28, 4 and 55, each in 2 s. Saved: 2, 1, 0 and 3 times.
  life = (4 * 20 + 2 * (37 + 28 + 4 + 55) + 4 * 6 + 30) + (60 + 600 + 5)
  assert clock.now == 1.7e9 + life == 1.7e9 + 1047
  assert values['life_seconds'] == pytest.approx(life)
  assert values['new_step_seconds'] == pytest.approx(200)  # Each of the 100 steps once.
  assert values['goodput'] == pytest.approx(200 / 1047)
  # Lines were written up to steps 30, 50 and none: the last start repeats steps 46 to 50.
  assert values['repeated_step_seconds'] == pytest.approx(10)
  assert values['starts'] == 4
  assert read_goodput(tmp_path).values() == pytest.approx(values)


def test_a_complete_run_that_is_started_again_keeps_its_goodput(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  values = start(tmp_path, clock, resume=0, until=20, steps=20, step_seconds=1.0)
  text = (tmp_path / 'goodput.jsonl').read_text(encoding='utf-8')
  clock.pass_time(1e6)
  assert start(tmp_path, clock, resume=20, until=20, steps=20, step_seconds=1.0) == {}
  assert (tmp_path / 'goodput.jsonl').read_text(encoding='utf-8') == text
  assert read_goodput(tmp_path).share == pytest.approx(values['goodput'])


def test_a_line_with_new_and_repeated_steps_is_divided_by_their_numbers():
  lines = [
    Line(1, 0.0, 0, 0.0), Line(1, 14.0, 6, 12.0),
    Line(2, 20.0, 2, 0.0), Line(2, 41.0, 10, 16.0),
  ]  # fmt: skip
  measured = measure_goodput(lines)
  # Steps 3 to 6 of the second start are repeated, 7 to 10 are new, at 2 s each.
  assert (measured.life, measured.new, measured.repeated) == (41.0, 12.0 + 8.0, 8.0)


def test_time_without_steps_is_no_time_of_new_steps():
  lines = [Line(1, 0.0, 0, 0.0), Line(1, 90.0, 0, 90.0), Line(1, 100.0, 5, 100.0)]
  assert measure_goodput(lines).share == pytest.approx(0.1)


def test_a_clock_that_is_set_back_between_two_starts_counts_as_no_time():
  lines = [
    Line(1, 1000.0, 0, 0.0), Line(1, 1100.0, 50, 100.0),
    Line(2, 500.0, 50, 0.0), Line(2, 600.0, 100, 100.0),
  ]  # fmt: skip
  assert measure_goodput(lines).share == 1.0


@pytest.mark.parametrize('tail', ['{"start": 1, "ti', '\0\0\n', '[]\n', '{"start": 1}\n', '3\n'])
def test_lines_that_a_crash_cut_short_are_removed(tmp_path, monkeypatch, tail):
  clock = Clock(monkeypatch)
  start(tmp_path, clock, resume=0, until=15, steps=30, step_seconds=1.0)
  with (tmp_path / 'goodput.jsonl').open('a', encoding='utf-8') as file:
    file.write(tail)
  start(tmp_path, clock, resume=15, until=30, steps=30, step_seconds=1.0)
  lines = (tmp_path / 'goodput.jsonl').read_text(encoding='utf-8').splitlines()
  assert [json.loads(line)['start'] for line in lines] == [1] * 4 + [2] * 5
  assert read_goodput(tmp_path).new == pytest.approx(30)


def test_other_hosts_write_nothing(tmp_path):
  log = GoodputLog(tmp_path, step=0, steps=9, began=0.0, report=print, write=False)
  assert log.record(1, 1.0) == {}
  log.flush()
  log.close()
  assert not list(tmp_path.iterdir())


# A run that prints when it saves, which is no time of steps.
TRAINING = """
import sys, vit_jax.train
from vit_jax.cli.train import run_train_job
save_checkpoint = vit_jax.train.save_checkpoint
def save(*args):
  print('saving', file=sys.stderr, flush=True)
  save_checkpoint(*args)
  print('saved', file=sys.stderr, flush=True)
vit_jax.train.save_checkpoint = save
run_train_job('quickstart')
"""
STEP = re.compile(r'step (\d+)/\d+  loss')


def run_and_time(workdir, log, kill_after: int | None) -> dict[int, float]:
  """Run until a step is printed, and kill the run then, or to its end.

  Return {step: seconds} by the clock of this process.
  """
  command = [
    sys.executable, '-u', '-c', TRAINING, '--config=tests/tiny.py', '--no-report',
    f'--workdir={workdir}', '--config.steps=90', '--config.eval_every=0', '--config.save_every=20',
    '--config.data.batch=512', '--config.log_ids=False',
  ]  # fmt: skip
  environment = os.environ | ENVIRONMENT | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  seconds: dict[int, float] = {}
  began = taken = 0.0  # When the clock of the steps began to run, and what it showed before.
  with subprocess.Popen(
    command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  ) as process:
    for line in process.stderr:
      now = time.monotonic()
      log.write(line)
      if 'ready to step' in line or line == 'saved\n':
        began = now
      elif line == 'saving\n':
        taken += now - began
      elif match := STEP.match(line):
        seconds[int(match[1])] = taken + now - began
        began, taken = now, 0.0
        if int(match[1]) == kill_after:
          process.send_signal(signal.SIGKILL)
  assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
  return seconds


def test_goodput_of_a_killed_run_equals_that_of_another_clock(tmp_path):
  """The other clock is that of this process, which reads the lines that the run prints."""
  workdir, taken, new = tmp_path / 'run', 0, 0.0
  with (tmp_path / 'log').open('w', encoding='utf-8') as log:
    for kill_after in (33, 47, 72, None):
      seconds = run_and_time(workdir, log, kill_after)
      new += sum(each for step, each in seconds.items() if step > taken)
      taken = max(taken, *seconds)
  lines = [json.loads(line) for line in (workdir / 'goodput.jsonl').read_text('utf-8').splitlines()]
  life = (workdir / 'goodput.jsonl').stat().st_mtime - lines[0]['time']
  (record,) = read_metrics(workdir, 'goodput')
  assert record['starts'] == 4 and taken == 90
  assert record['life_seconds'] == pytest.approx(life, rel=0.01)
  assert record['goodput'] == pytest.approx(new / life, rel=0.01)
