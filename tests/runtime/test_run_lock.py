"""One trainer per run directory; the lock of a dead trainer is released."""

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
  """Start a process that holds the lock of `tmp_path`."""
  command = [sys.executable, '-c', f'{HOLD}; time.sleep(600)', str(tmp_path)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
  assert process.stdout.readline() == b'1\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def write_owner(workdir, **who):
  (workdir / 'trainer.json').write_text(
    json.dumps({'host': 'far', 'pid': 7, 'boot': 'another', 'token': 'x', 'beat': 0} | who),
    encoding='utf-8',
  )


def test_a_second_trainer_is_an_error_that_names_the_first(tmp_path, other):
  with pytest.raises(
    UserError,
    match=f'process {other.pid} on {platform.node()} .*--workdir',
  ):
    RunLock(tmp_path)


def test_a_killed_trainer_releases_its_lock_immediately(tmp_path, other, monkeypatch):
  monkeypatch.setattr(module, 'STALE_AFTER', 1e9)  # Waiting for it would time out.
  os.kill(other.pid, signal.SIGKILL)
  other.wait()
  assert (tmp_path / 'trainer.json').exists()
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()


def test_a_remote_trainer_with_heartbeats_keeps_the_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.1)
  write_owner(tmp_path)
  later = threading.Timer(0.3, write_owner, [tmp_path], {'beat': 1})
  later.start()
  with pytest.raises(UserError, match='process 7 on far'):
    RunLock(tmp_path)
  later.join()


def test_a_remote_trainer_without_heartbeats_loses_the_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.1)
  monkeypatch.setattr(module, 'STALE_AFTER', 0.5)
  write_owner(tmp_path)
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()


def test_a_suspended_trainer_notices_that_another_has_taken_over(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.05)
  lock = RunLock(tmp_path)
  lock.check_held()
  write_owner(tmp_path)
  with pytest.raises(UserError, match='process 7 on far'):
    while True:
      lock.check_held()
  lock.release()
  # The file of the other trainer stays.
  assert json.loads((tmp_path / 'trainer.json').read_text(encoding='utf-8'))['pid'] == 7


def test_heartbeats_are_written(tmp_path, monkeypatch):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.02)
  lock, seen = RunLock(tmp_path), set()
  while len(seen) < 3:
    seen.add(json.loads((tmp_path / 'trainer.json').read_text(encoding='utf-8'))['beat'])
  assert max(seen) - min(seen) >= 2
  lock.release()


@pytest.mark.parametrize('content', ['', '{', '[]', '{"boot": 3}', '\x00' * 100])
def test_an_invalid_trainer_json_does_not_block_the_directory(tmp_path, monkeypatch, content):
  monkeypatch.setattr(module, 'HEARTBEAT_PERIOD', 0.02)
  monkeypatch.setattr(module, 'STALE_AFTER', 0.1)
  (tmp_path / 'trainer.json').write_text(content, encoding='utf-8')
  RunLock(tmp_path).release()
  assert not (tmp_path / 'trainer.json').exists()
