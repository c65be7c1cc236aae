"""The watchdog ends processes that hang, and only those."""

import signal
import subprocess
import sys
import time

import jax

from tests.runs import ROOT
from vit_jax.runtime.watchdog import Watchdog

STUCK = """
import sys, time
sys.path.insert(0, {root!r})
from vit_jax.runtime.watchdog import Watchdog
watchdog = Watchdog()
watchdog.on_hang = lambda text: open({file!r}, 'w').write(text)
watchdog.start(single_process={single_process})
watchdog.arm({seconds})
print('started', flush=True)
def hang():
  {how}
hang()
"""


def run_watched(
  tmp_path, how: str, *, seconds: float = 1, single_process: bool = True
) -> subprocess.CompletedProcess:
  code = STUCK.format(
    root=str(ROOT),
    file=str(tmp_path / 'stacks'),
    how=how,
    seconds=seconds,
    single_process=single_process,
  )
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=100
  )


def test_a_hanging_process_is_ended_and_its_stacks_are_shown(tmp_path):
  done = run_watched(
    tmp_path, 'import threading; threading.Lock().acquire() and threading.Event().wait()'
  )
  assert done.returncode == 76
  for text in (done.stderr, (tmp_path / 'stacks').read_text(encoding='utf-8')):
    assert 'MainThread:' in text and 'in hang' in text


def test_native_code_that_holds_the_interpreter_lock_is_ended(tmp_path):
  done = run_watched(
    tmp_path,
    'import ctypes; time.sleep(1); ctypes.PyDLL(None).sleep(90)',
    seconds=3,
    single_process=False,
  )
  assert done.returncode == 1
  assert 'Timeout (0:00:13)!' in done.stderr and 'in hang' in done.stderr


def test_a_process_that_arms_it_in_time_is_not_ended(tmp_path):
  assert (
    run_watched(tmp_path, 'for _ in range(20): watchdog.arm(1.5); time.sleep(0.1)').returncode == 0
  )


def test_a_limit_of_0_is_no_limit(tmp_path):
  assert run_watched(tmp_path, 'watchdog.arm(0); time.sleep(2)', seconds=0.5).returncode == 0


def test_time_while_suspended_does_not_count(tmp_path):
  code = STUCK.format(
    root=str(ROOT),
    file=str(tmp_path / 'stacks'),
    how='time.sleep(4)',
    seconds=6,
    single_process=True,
  )
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'started\n'
    process.send_signal(signal.SIGSTOP)
    time.sleep(9)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0


def test_step_done_waits_for_the_result_of_three_calls_ago_and_arms_the_step_limit(monkeypatch):
  waited, armed = [], []
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  watchdog = Watchdog()
  monkeypatch.setattr(watchdog, 'arm', armed.append)
  watchdog.set_timeouts(step=3, slow=70)
  assert armed == [70]
  for step in range(5):
    watchdog.step_done(step)
  assert waited == [0, 1] and armed == [70] + [3] * 5
  watchdog.set_timeouts(step=4, slow=80)  # The next stage: no step of the last one is waited for.
  for step in range(10, 13):
    watchdog.step_done(step)
  assert waited == [0, 1] and armed[6:] == [80, 4, 4, 4]
  watchdog.arm_slow()
  assert armed[-1] == 80
