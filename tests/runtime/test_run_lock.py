"""One trainer a directory: the second is refused by name, and a dead one's lock is nobody's."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.runtime import run_lock as module
from vit_jax.runtime.run_lock import RunLock

HOLD = (
  'import sys, time; from pathlib import Path; from vit_jax.runtime.run_lock import RunLock; '
  'RunLock(Path(sys.argv[1])); print(1, flush=True)'
)


@pytest.fixture
def other(tmp_path):
  """A process that trains in `tmp_path`."""
  command = [sys.executable, '-c', f'{HOLD}; time.sleep(600)', str(tmp_path)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
  assert process.stdout.readline() == b'1\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def write(workdir, **who):
  (workdir / 'trainer.json').write_text(
    json.dumps({'host': 'far', 'pid': 7, 'boot': 'another', 'token': 'x', 'beat': 0} | who)
  )


def test_a_second_trainer_is_refused_and_told_who_has_the_directory(tmp_path, other):
  with pytest.raises(
    UserError,
    match=f'being trained in by process {other.pid} on {platform.node()}: wait .* --workdir',
  ):
    RunLock(tmp_path)


def test_a_killed_trainer_has_no_lock_at_once(tmp_path, other, monkeypatch):
  monkeypatch.setattr(module, 'STALE_AFTER', 1e9)  # Which would be noticed.
  os.kill(other.pid, signal.SIGKILL)
  other.wait()
  assert (tmp_path / 'trainer.json').exists()
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()


def test_a_trainer_on_another_machine_that_shows_signs_of_life_is_respected(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.1)
  write(tmp_path)
  later = threading.Timer(0.3, write, [tmp_path], {'beat': 1})
  later.start()
  with pytest.raises(UserError, match='process 7 on far'):
    RunLock(tmp_path)
  later.join()


def test_a_trainer_on_another_machine_that_shows_none_is_gone(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.1)
  monkeypatch.setattr(module, 'STALE_AFTER', 0.5)
  write(tmp_path)
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()


def test_who_stood_still_for_long_learns_that_another_has_taken_over(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.05)
  lock = RunLock(tmp_path)
  lock.check_held()
  write(tmp_path)
  with pytest.raises(UserError, match='process 7 on far.* It took this one to be gone'):
    while True:
      lock.check_held()
  lock.release()
  assert (
    json.loads((tmp_path / 'trainer.json').read_text())['pid'] == 7
  )  # Nobody else's is taken away.


def test_signs_of_life_are_given(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.02)
  lock, seen = RunLock(tmp_path), set()
  while len(seen) < 3:
    seen.add(json.loads((tmp_path / 'trainer.json').read_text())['beat'])
  assert max(seen) - min(seen) >= 2
  lock.release()


@pytest.mark.parametrize('content', ['', '{', '[]', '{"boot": 3}', '\x00' * 100])
def test_a_file_that_says_nothing_keeps_nobody_out(tmp_path, monkeypatch, content):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.02)
  monkeypatch.setattr(module, 'STALE_AFTER', 0.1)
  (tmp_path / 'trainer.json').write_text(content)
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()
