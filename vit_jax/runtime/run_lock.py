"""Allow one trainer per run directory: a file lock, and a heartbeat for other machines.

The kernel holds the lock on WORKDIR/.lock and releases it however the process ends. Storage that is
mounted on several machines may not lock between them. The trainer therefore rewrites
WORKDIR/trainer.json periodically, and a trainer on another machine first watches whether the file
changes. Clocks are never compared.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
import weakref
from pathlib import Path

from vit_jax.errors import StorageError, UserError
from vit_jax.runtime.files import read_json_object, summarize_error, write_atomically

HEARTBEAT_PERIOD = 5.0  # Seconds between two writes of trainer.json.
STALE_AFTER = 20.0  # Seconds without a heartbeat after which a remote trainer is considered dead.


class RunLock:
  """The right to train in an existing directory.

  Raises UserError that names the process that holds it.
  """

  def __init__(self, workdir: Path):
    self._workdir, self._path = workdir, workdir / 'trainer.json'
    self._lost_error: UserError | None = None
    self._lock_path = workdir / '.lock'
    self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    local = _try_lock_file(self._lock_fd)
    if local == 'taken':
      os.close(self._lock_fd)
      raise UserError(_format_locked_message(workdir, self._read_owner()))
    self._check_no_remote_trainer(local)
    self._owner = {
      'host': platform.node(),
      'pid': os.getpid(),
      'boot': _boot_id(),
      'token': uuid.uuid4().hex,
      'beat': 0,
    }
    self._write_heartbeat()
    self._released = threading.Event()
    threading.Thread(
      target=_run_heartbeat, args=(weakref.ref(self), self._released), name='lock', daemon=True
    ).start()

  def check_held(self):
    """Raise UserError if another trainer took over, as it may while this process is suspended.

    Raises StorageError if the directory is gone. Only reads what the last heartbeat found.
    """
    if self._lost_error:
      raise self._lost_error

  def check_directory(self):
    """Raise StorageError if the directory was removed, renamed or replaced.

    The lock file stands for it: `rm -r` may leave a directory that a checkpoint is written to.
    """
    try:
      if os.path.samestat(os.fstat(self._lock_fd), self._lock_path.stat()):
        return
    except (FileNotFoundError, NotADirectoryError):
      pass
    except OSError:  # The storage fails for the moment.
      return
    raise StorageError(
      f'{self._workdir} was removed or renamed during the run, which therefore ends; a renamed '
      'directory can be resumed under its new name'
    )

  def release(self):
    """Release the directory, so that the next trainer need not wait."""
    if self._released.is_set():
      return
    self._released.set()
    with contextlib.suppress(OSError, UserError):
      if (self._read_owner() or {}).get('token') == self._owner['token']:
        self._path.unlink()
    os.close(self._lock_fd)

  def _check_no_remote_trainer(self, local: str):
    """Raise UserError if a trainer beyond the reach of this machine's locks sends heartbeats."""
    seen = self._read_owner()
    if not seen or (local == 'ours' and seen.get('boot') == _boot_id()):
      return
    end = time.monotonic() + STALE_AFTER
    while time.monotonic() < end:
      time.sleep(HEARTBEAT_PERIOD / 5)
      if (now := self._read_owner()) and now != seen:
        os.close(self._lock_fd)
        raise UserError(_format_locked_message(self._workdir, now))

  def _read_owner(self) -> dict | None:
    """Return the content of trainer.json, or None if it is missing or invalid."""
    with contextlib.suppress(UserError):
      return read_json_object(self._path)
    return None

  def _write_heartbeat(self):
    write_atomically(self._path, json.dumps(self._owner) + '\n')

  def _renew_heartbeat(self):
    """Write a heartbeat, or note that the directory is gone or that another trainer has it."""
    try:
      self.check_directory()
    except StorageError as error:
      self._lost_error = error
      return
    now = self._read_owner()
    if now and now.get('token') != self._owner['token']:
      self._lost_error = UserError(
        _format_locked_message(self._workdir, now) + '; it considered this process dead'
      )
      return
    self._owner['beat'] += 1
    with contextlib.suppress(OSError, UserError):  # Checkpoints report storage errors.
      self._write_heartbeat()


def _try_lock_file(file: int) -> str:
  """Try to lock a file: return 'ours', 'taken', or 'unknown' if the file system has no locks.

  The process holds the lock until it ends; its children do not inherit it.
  """
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    return 'taken'
  except OSError:
    return 'unknown'
  return 'ours'


def _run_heartbeat(lock: weakref.ref, released: threading.Event):
  """Write heartbeats until the lock is released, lost or garbage-collected."""
  while not released.wait(HEARTBEAT_PERIOD):
    held = lock()
    if held is None or held._lost_error:
      return
    held._renew_heartbeat()
    del held


def _boot_id() -> str:
  """Return an ID of this boot of the machine's kernel, which its containers share."""
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
  except OSError as error:
    return f'{platform.node()} ({summarize_error(error)})'


def _format_locked_message(workdir: Path, owner: dict | None) -> str:
  """Return the message that names the process that trains in `workdir`."""
  who = f'process {owner.get("pid")} on {owner.get("host")}' if owner else 'another process'
  return f'{who} is training in {workdir}; wait until it ends, or choose another --workdir'
