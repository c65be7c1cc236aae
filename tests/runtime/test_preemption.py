"""SIGTERM and Ctrl-C sent to one process, to a process group, and to one host of two."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ENVIRONMENT, ROOT, Run, account, finished, stopped_at
from vit_jax.runtime.preemption import Preemption

# A step takes 8 ms. A run must not end before the test, on a busy machine, has sent its signal.
STEPS = 400
LONG = f'--config.steps={STEPS}'


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> dict:
  """Return the account of an uninterrupted run on one host with two devices."""
  workdir = tmp_path_factory.mktemp('runs') / 'uninterrupted'
  finished(workdir, LONG)
  return account(workdir)


def test_a_run_stopped_three_times_on_one_and_two_hosts_equals_an_uninterrupted_run(
  uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  with Run(workdir, LONG, '--config.data.workers=1', start=0) as run:
    run.until(f'step 5/{STEPS}')
    run.send(signal.SIGTERM, group=True)
    assert run.codes() == [75], run.text()
    first = stopped_at(run.text())
    assert first >= 5
  with Run(workdir, LONG, hosts=2, devices=1, start=1) as run:
    run.until(f'step {first + 3}/{STEPS}')
    run.send(signal.SIGTERM, host=1)
    assert run.codes() == [75, 75], run.text() + run.text(1)
    second = stopped_at(run.text())
    assert second >= first + 3
    assert f'resumes after step {first}' in run.text()
  with Run(workdir, LONG, start=2) as run:
    run.until(f'step {second + 20}/{STEPS}  loss')
    run.send(signal.SIGINT)
    assert run.codes() == [130], run.text()
    # An evaluation may be missing; the next start makes up for it.
    assert stopped_at(run.text()) >= second + 20
  finished(workdir, LONG)
  assert account(workdir) == uninterrupted


def test_a_signal_before_the_first_step_ends_the_run_immediately(tmp_path):
  with Run(tmp_path / 'run') as run:
    time.sleep(2)
    run.send(signal.SIGTERM)
    began = time.monotonic()
    assert run.codes() in ([75], [143])  # 143: before Python has installed the handlers.
    assert time.monotonic() - began < 30
  assert not list((tmp_path / 'run').glob('checkpoints/*'))


WITH_HANDLERS = """
import sys, time
sys.path.insert(0, {root!r})
from vit_jax.runtime.preemption import Preemption
preemption = Preemption()
preemption.install_handlers()
preemption.start_saving()
print('ready', flush=True)
{then}
"""
WAIT = (
  'while not preemption.should_stop(): time.sleep(0.01)\npreemption.stop_saving(); '
  'time.sleep(1); sys.exit(preemption.exit_code)'
)
HANG = (
  'import ctypes; ctypes.CDLL(None).sleep(60)'  # In native code, where Python's handlers never run.
)


@pytest.mark.parametrize(
  ('then', 'signals', 'code'),
  [
    (WAIT, [signal.SIGTERM], 75),
    (WAIT, [signal.SIGTERM, signal.SIGTERM], 75),
    (WAIT, [signal.SIGTERM, signal.SIGINT], 75),
    (WAIT, [signal.SIGINT], 130),
    (HANG, [signal.SIGINT, signal.SIGINT], 130),
  ],
)
def test_the_exit_code_depends_on_the_first_signal(then, signals, code):
  command = [sys.executable, '-c', WITH_HANDLERS.format(root=str(ROOT), then=then)]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    for number in signals:
      process.send_signal(number)
      time.sleep(0.2)
    _, err = process.communicate(timeout=50)
  assert process.returncode == code
  assert err.startswith(f'{signals[0].name}: saving and stopping\n')


BETWEEN = (
  'preemption.has_next_stage = True; preemption.stop_saving(); print("between", flush=True); '
  + HANG
)


def test_a_signal_between_two_stages_ends_the_process():
  command = [sys.executable, '-c', WITH_HANDLERS.format(root=str(ROOT), then=BETWEEN)]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert [process.stdout.readline() for _ in range(2)] == ['ready\n', 'between\n']
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)
  assert (process.returncode, err) == (75, 'SIGTERM: there is nothing to save yet\n')


def test_hosts_stop_after_the_same_step_if_any_of_them_got_a_signal():
  """Two hosts in lockstep. The third answer is the vote of the first call."""
  votes = [0, 2]
  ours, theirs = Preemption(), Preemption()
  for preemption in (ours, theirs):
    preemption.start_saving(lambda vote: max(votes))
  assert [ours.should_stop(), theirs.should_stop(), ours.should_stop(), theirs.should_stop()] == [
    False
  ] * 4
  assert [ours.should_stop(), theirs.should_stop()] == [True, True]
  assert ours.exit_code == 75


def test_hosts_trace_the_same_step_once_if_one_of_them_got_sigusr1():
  """Two hosts in lockstep, whose votes the list has by their calls."""
  hosts, votes = [Preemption(), Preemption()], {0: [], 1: []}

  def vote_of(host: int):
    def largest(vote: int):
      votes[host].append(vote)
      call = len(votes[host]) - 1
      return Lazy(lambda: max(votes[other][call] for other in (0, 1)))

    return largest

  for i, preemption in enumerate(hosts):
    preemption.start_saving(vote_of(i))
  asked = []
  for call in range(8):
    if call == 1:
      hosts[1]._trace_signals += 1  # As the thread that handles signals does.
    assert [preemption.should_stop() for preemption in hosts] == [False, False]
    asked.append([preemption.take_trace_request() for preemption in hosts])
  assert asked == [[False, False]] * 3 + [[True, True]] + [[False, False]] * 4


class Lazy:
  """A number that is computed when it is read."""

  def __init__(self, compute):
    self.compute = compute

  def __int__(self):
    return self.compute()


def test_without_handlers_no_signal_is_noticed():
  preemption = Preemption()
  preemption.start_saving()
  assert not preemption.should_stop()
  preemption.stop_saving()
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_terminal_that_hangs_up_counts_as_sigterm():
  # The tests themselves may have been started with nohup, whose children ignore the signal.
  heard = 'import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n'
  code = heard + WITH_HANDLERS.format(root=str(ROOT), then=WAIT)
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert process.stdout.readline() == b'ready\n'
  process.send_signal(signal.SIGHUP)
  _, err = process.communicate(timeout=50)
  assert process.returncode == 75 and err == b'SIGHUP: saving and stopping\n'


def test_a_run_that_was_started_with_nohup_ignores_a_hang_up():
  code = WITH_HANDLERS.format(root=str(ROOT), then=WAIT)
  command = ['sh', '-c', 'trap "" HUP; exec "$@"', 'sh', sys.executable, '-c', code]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == b'ready\n'
  process.send_signal(signal.SIGHUP)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=50)
  assert process.returncode == 75 and err == b'SIGTERM: saving and stopping\n'


def test_a_run_whose_screen_is_gone_completes(tmp_path):
  command = [sys.executable, '-u', 'run_pretrain.py', '--config=tests/tiny.py', '--config.steps=20']
  process = subprocess.Popen(
    [*command, f'--workdir={tmp_path / "run"}'],
    env=os.environ | ENVIRONMENT | {'JAX_PLATFORMS': 'cpu'},
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  process.stdout.readline()
  process.stdout.close()
  assert process.wait() == 0
  assert account(tmp_path / 'run')['step'] == 20
  assert not (tmp_path / 'run' / 'failures').exists()
