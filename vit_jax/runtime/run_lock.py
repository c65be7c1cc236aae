"""One trainer a directory: a lock that dies with its process, and a sign of life for machines between which locks don't reach.

The lock is the kernel's, on WORKDIR/.lock: however the process ends, it is free at once. Storage that is mounted on several
machines may not lock between them, so whoever trains writes WORKDIR/trainer.json again and again, and a trainer on another
machine first watches whether it changes. No clocks are compared.
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

from vit_jax.errors import UserError
from vit_jax.runtime.files import read_json_object, summarize_error, write_atomically

HEARTBEAT_PERIOD = 5.0  # Seconds between two signs of life.
STALE_AFTER = (
  20.0  # Seconds without one after which a trainer on another machine is taken to be gone.
)


class RunLock:
  """The right to train in a directory, which exists. UserError that names the process that has it."""

  def __init__(self, workdir: Path):
    self._workdir, self._path, self._lost = workdir, workdir / 'trainer.json', ''
    self._file = os.open(workdir / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
    local = _try_lock_file(self._file)
    if local == 'taken':
      os.close(self._file)
      raise UserError(_format_locked_message(workdir, self._read()))
    self._refuse_others(local)
    self._me = {
      'host': platform.node(),
      'pid': os.getpid(),
      'boot': _boot_id(),
      'token': uuid.uuid4().hex,
      'beat': 0,
    }
    self._write()
    self._ended = threading.Event()
    threading.Thread(
      target=_run_heartbeat, args=(weakref.ref(self), self._ended), name='lock', daemon=True
    ).start()

  def check_held(self):
    """UserError where another trainer has taken the directory over, as it may when this process stood still for long."""
    if self._lost:
      raise UserError(self._lost)

  def release(self):
    """Lets the next one in at once."""
    if self._ended.is_set():
      return
    self._ended.set()
    with contextlib.suppress(OSError, UserError):
      if (self._read() or {}).get('token') == self._me['token']:
        self._path.unlink()
    os.close(self._file)

  def _refuse_others(self, local: str):
    """UserError where a trainer that this machine's locks don't reach shows signs of life."""
    seen = self._read()
    if not seen or (local == 'ours' and seen.get('boot') == _boot_id()):
      return
    end = time.monotonic() + STALE_AFTER
    while time.monotonic() < end:
      time.sleep(HEARTBEAT_PERIOD / 5)
      if (now := self._read()) and now != seen:
        os.close(self._file)
        raise UserError(_format_locked_message(self._workdir, now))

  def _read(self) -> dict | None:
    """Who trains, if the file says so."""
    with contextlib.suppress(UserError):
      return read_json_object(self._path)
    return None

  def _write(self):
    write_atomically(self._path, json.dumps(self._me) + '\n')

  def _beat(self):
    """A sign of life; or the end, where the directory is another's by now."""
    now = self._read()
    if now and now.get('token') != self._me['token']:
      self._lost = _format_locked_message(self._workdir, now) + '. It took this one to be gone'
      return
    self._me['beat'] += 1
    with contextlib.suppress(
      OSError, UserError
    ):  # What matters fails elsewhere, and is said there.
      self._write()


def _try_lock_file(file: int) -> str:
  """'ours', 'taken', or 'unknown' where the file system has no locks. A process has it until it ends; its children don't."""
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    return 'taken'
  except OSError:
    return 'unknown'
  return 'ours'


def _run_heartbeat(lock: weakref.ref, ended: threading.Event):
  """Gives signs of life until the lock is released, lost or forgotten."""
  while not ended.wait(HEARTBEAT_PERIOD):
    held = lock()
    if held is None or held._lost:
      return
    held._beat()
    del held


def _boot_id() -> str:
  """This start of this machine's kernel, which containers on it share."""
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError as error:
    return f'{platform.node()} ({summarize_error(error)})'


def _format_locked_message(workdir: Path, who: dict | None) -> str:
  """Who has it."""
  who = f'process {who.get("pid")} on {who.get("host")}' if who else 'another process'
  return f'{workdir} is being trained in by {who}: wait until it ends, or choose another --workdir'
