"""Processes that are stuck in three ways, and one that only seems to be."""

import signal
import subprocess
import sys
import time

from tests.runs import ROOT

STUCK = """
import sys, time
sys.path.insert(0, {root!r})
from vit_jax.runtime.watchdog import Watchdog
watchdog = Watchdog()
watchdog.on_hang = lambda text: open({file!r}, 'w').write(text)
watchdog.start(single_process={single_process})
watchdog.arm({seconds})
print('started', flush=True)
def waiting_for_ever():
  {how}
waiting_for_ever()
"""


def stuck(
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


def test_one_that_waits_for_ever_is_ended_and_shows_where(tmp_path):
  done = stuck(
    tmp_path, 'import threading; threading.Lock().acquire() and threading.Event().wait()'
  )
  assert done.returncode == 76
  for text in (done.stderr, (tmp_path / 'stacks').read_text()):
    assert text.startswith('no progress for 1 s')
    assert 'MainThread:' in text and 'in waiting_for_ever' in text


def test_native_code_that_keeps_pythons_lock_is_ended_too(tmp_path):
  done = stuck(
    tmp_path,
    'import ctypes; time.sleep(1); ctypes.PyDLL(None).sleep(90)',
    seconds=3,
    single_process=False,
  )
  assert done.returncode == 1
  assert 'Timeout (0:00:13)!' in done.stderr and 'in waiting_for_ever' in done.stderr


def test_signs_of_life_keep_it_quiet(tmp_path):
  assert stuck(tmp_path, 'for _ in range(20): watchdog.arm(1.5); time.sleep(0.1)').returncode == 0


def test_without_a_limit_it_is_quiet(tmp_path):
  assert stuck(tmp_path, 'watchdog.arm(0); time.sleep(2)', seconds=0.5).returncode == 0


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path):
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
