"""The checkpoints of a run, in WORKDIR/checkpoints/STEP: saving, retention and restoring.

Checkpoints are saved in the background. The directory listing is the only source of truth: no
decision depends on a save that was started, nor on a clock. With several hosts, host 0 lists,
renames and deletes, and all hosts follow its result.
"""

import functools
import itertools
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import jax

from vit_jax.checkpoint.io import (
  CheckpointWriter,
  CorruptCheckpointError,
  NonFiniteStateError,
  check_checksums,
  check_readable,
  read_back,
  read_checkpoint_as_numpy,
  restore_state,
  state_to_dict,
)
from vit_jax.errors import StorageError, UserError
from vit_jax.runtime.cluster import broadcast_first
from vit_jax.runtime.files import (
  RETRY_DELAYS,
  explain_write_errors,
  name_alias,
  retry_io,
  summarize_error,
)
from vit_jax.runtime.run_lock import RunLock
from vit_jax.runtime.screen import print_stderr
from vit_jax.step import TrainState

# Seconds after which an unfinished save is given up, which ends the run.
SAVE_TIMEOUT = 1800.0
MAX_FAILED_SAVES = 3  # Failed saves in a row before the run ends.
# Directories that interrupted saves and deletions leave behind.
LEFTOVER_NAME = re.compile(r'\d+\.(orbax-checkpoint-tmp.*|deleted)')


class CheckpointManager:
  """Save and restore the checkpoints of one run.

  The newest `max_to_keep` checkpoints and those at multiples of `keep_every` steps are retained.
  If `workdir` exists, the constructor acquires it.

  Raises UserError if another process is training in `workdir`.
  """

  def __init__(self, workdir: Path, *, max_to_keep: int = 1, keep_every: int = 0):
    self._workdir, self._directory = workdir, workdir / 'checkpoints'
    self._max_to_keep, self._keep_every = max_to_keep, keep_every
    self._acquired, self._lock, self._pending, self._is_last_save = False, None, None, False
    self._newest_step, self._failed_saves, self._last_error = -1, 0, ''
    self._writer = CheckpointWriter()
    if broadcast_first('exists' if workdir.exists() else ''):
      self.acquire_directory()

  def acquire_directory(self):
    """Create and lock the directory, unless this was done before.

    The first save does it at the latest. Raises UserError if another process is training there.
    """
    if self._acquired:
      return
    message = ''
    try:
      if jax.process_index() == 0:
        self._acquire()
    except UserError as error:
      message = str(error)
    if message := broadcast_first(message):
      raise UserError(message)
    self._acquired, self._newest_step = True, self._find_newest_step()

  def _acquire(self):
    with explain_write_errors(self._workdir):
      retry_io(
        f'creating {self._directory}',
        lambda: self._directory.mkdir(parents=True, exist_ok=True),
      )
      self._lock = RunLock(self._workdir)
      self._remove_temporaries()

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """Return (state, counters) of the newest intact checkpoint; None if nothing was ever saved.

    The state has the layout of `like` (shapes with shardings), bit for bit. `counters` is the
    dictionary given to `save`; it is empty for checkpoints that were written without one.

    Newer checkpoints that are damaged are reported and moved to checkpoints/damaged. Raises
    UserError if all checkpoints are damaged, and if one holds another architecture.
    """
    damaged: dict[int, str] = {}
    while True:
      candidates = [step for step in list_saved_steps(self._directory) if step not in damaged]
      step = int(broadcast_first(str(max(candidates, default=-1))))
      if step < 0:
        break
      restored, reason = self._restore_step(step, like)
      if not reason:
        self._quarantine(damaged)
        self._newest_step = step
        return restored
      damaged[step] = reason
      if jax.process_index() == 0:
        print_stderr(f'{self._directory / str(step)} is damaged: {reason}')
    if broadcast_first('damaged' if damaged or (self._directory / 'damaged').is_dir() else ''):
      raise UserError(
        f'all checkpoints in {self._directory} are damaged; to start again from step 0, choose '
        'another --workdir, or remove them'
      )
    return None

  def _restore_step(
    self, step: int, like: TrainState
  ) -> tuple[tuple[TrainState, dict] | None, str]:
    """Return ((state, counters), ''), or (None, the reason why the checkpoint is damaged).

    The result is the same on all hosts.
    """
    reason = ''
    try:
      state, expected, counters = restore_state(self._directory / str(step), like)
    except CorruptCheckpointError as error:
      reason = str(error)
    if reason := broadcast_first(reason):
      return None, reason
    try:
      check_checksums(state_to_dict(state), expected)
    except (CorruptCheckpointError, NonFiniteStateError) as error:  # The same on all hosts.
      return None, str(error)
    return (state, counters), ''

  def save(self, state: TrainState, step: int, counters: dict | None = None):
    """Copy the state off the devices, and write it in the background.

    Returns without saving if `step` is the newest saved step.

    Args:
      state: The state after `step`.
      step: The step, not older than the newest saved one, else ValueError.
      counters: A small JSON-compatible dictionary of host values, which is saved with the state.
    Raises StorageError if 3 saves in a row have failed or one does not finish in 30 minutes, and
    NonFiniteStateError if the previous state was not finite.
    """
    self.acquire_directory()
    if self._lock:
      self._lock.check_directory()
    self.check_for_errors()
    self._wait_for_save()
    if step < self._newest_step:
      raise ValueError(f'cannot save step {step}: step {self._newest_step} is saved already')
    if step == self._newest_step:
      return
    if self._failed_saves >= MAX_FAILED_SAVES:
      raise StorageError(
        f'{self._failed_saves} checkpoints in a row could not be saved; the last error: '
        f'{self._last_error}'
      )
    saving = _PendingSave(self._directory / str(step))
    try:
      self._writer.save(saving.path, state, step, counters or {})
      threading.Thread(
        target=self._finish_in_background, args=(saving,), name='checkpoint', daemon=True
      ).start()
    except OSError as error:
      if jax.process_count() > 1:  # The other hosts wait for this one.
        raise StorageError(f'cannot create {saving.path}: {summarize_error(error)}') from None
      saving.complete(error)
    self._pending = saving

  def check_for_errors(self):
    """Report errors of the background save; cheap enough for every step.

    Raises NonFiniteStateError if the state was not finite, UserError if another trainer has taken
    over the directory, and StorageError if the directory was removed or renamed.
    """
    if self._lock:
      self._lock.check_held()
    if self._pending:
      self._pending.report_error()

  def finish(self, state: TrainState, step: int, counters: dict | None = None):
    """Save the last state, read it back, with retries, and close the manager.

    Older checkpoints are deleted only afterwards. Takes the arguments of `save`. Raises
    StorageError if all attempts fail.
    """
    self._is_last_save = True
    for delay in (*RETRY_DELAYS, 0):
      self.save(state, step, counters)
      self._wait_for_save()
      self._read_back(self._directory / str(step))
      if not self._last_error:
        break
      time.sleep(delay)
    self.close()

  def finish_pending(self):
    """After an error, wait for the save in the background; the process would abort it otherwise."""
    if self._pending and not self._pending.done.wait(SAVE_TIMEOUT):
      print_stderr(f'{self._pending.path} is not written after {SAVE_TIMEOUT:.0f} s')

  def close(self):
    """Wait for the pending save, and release the directory.

    Raises StorageError if the last save failed.
    """
    self._wait_for_save()
    self._writer.close()
    if self._lock:
      self._lock.release()
    if self._last_error:
      raise StorageError(self._last_error)

  def _finish_in_background(self, saving: '_PendingSave'):
    """Wait in a thread for Orbax's threads, then delete old checkpoints."""
    try:
      self._writer.wait()
      if jax.process_index() == 0:
        self._check_written(saving.path)
        self._delete_old_checkpoints()
      saving.complete(None)
    except BaseException as error:  # The main thread reports it.
      saving.complete(error)

  def _wait_for_save(self):
    """Wait for the pending save and record its result, the same on all hosts."""
    if not self._pending:
      return
    if not self._pending.done.wait(SAVE_TIMEOUT):
      path, self._pending = self._pending.path, None
      raise StorageError(f'{path} is not written after {SAVE_TIMEOUT:.0f} s')
    self._pending.report_error()
    message, step = broadcast_first(self._pending.error_message), int(self._pending.path.name)
    self._newest_step = self._find_newest_step()
    self._last_error = message if self._newest_step < step else ''
    self._failed_saves = self._failed_saves + 1 if self._last_error else 0
    self._pending = None
    if self._last_error and jax.process_index() == 0:
      self._remove_temporaries()

  def _check_written(self, path: Path):
    """Raise CorruptCheckpointError if a new checkpoint is not readable, and move it aside."""
    try:
      check_readable(path)
    except CorruptCheckpointError as error:
      self._quarantine([int(path.name)])
      raise CorruptCheckpointError(f'it was written, but {error}') from None

  def _read_back(self, path: Path):
    """Record an error and move the checkpoint aside if its arrays are not what was saved.

    Otherwise delete the older checkpoints.
    """
    if self._last_error:
      return
    reason = ''
    if jax.process_index() == 0:
      try:
        read_back(path)
      except UserError as error:
        reason = str(error)
    if reason := broadcast_first(reason):
      self._last_error = f'{path} was saved, but it cannot be read back: {reason}'
      print_stderr(self._last_error)
      self._quarantine([int(path.name)])
      self._newest_step = self._find_newest_step()
      return
    self._is_last_save = False
    if jax.process_index() == 0:
      self._delete_old_checkpoints()

  def _find_newest_step(self) -> int:
    return int(broadcast_first(str(max(list_saved_steps(self._directory), default=-1))))

  def _delete_old_checkpoints(self):
    """Delete checkpoints that need not be retained; failures are reported and ignored.

    Each is renamed first, because a directory that is named after a step has to be complete. They
    stay until the last save has been read back.
    """
    if self._is_last_save:
      return
    steps = list_saved_steps(self._directory)
    for step in sorted(set(steps) - _steps_to_keep(steps, self._max_to_keep, self._keep_every)):
      renamed = self._directory / f'{step}.deleted'
      try:
        (self._directory / str(step)).rename(renamed)
        _remove_path(renamed)
      except OSError as error:
        print_stderr(f'cannot delete {renamed}: {summarize_error(error)}')

  def _remove_temporaries(self):
    """Remove leftovers of interrupted saves and deletions, while no save is pending."""
    for path in self._directory.iterdir():
      if LEFTOVER_NAME.fullmatch(path.name):
        retry_io(f'removing {path}', lambda path=path: _remove_path(path))

  def _quarantine(self, damaged: Iterable[int]):
    """Move damaged checkpoints to checkpoints/damaged, under unused names."""
    if not damaged or jax.process_index():
      return
    folder = self._directory / 'damaged'
    folder.mkdir(exist_ok=True)
    for step in damaged:
      source = self._directory / str(step)
      names = (f'{step}-{i}' if i else f'{step}' for i in itertools.count())
      target = next(folder / name for name in names if not (folder / name).exists())
      retry_io(f'moving {source} to {target}', functools.partial(source.rename, target))
      print_stderr(f'{source} is moved to {target}')


class _PendingSave:
  """A save in the background: its directory, and its error message once it is done."""

  def __init__(self, path: Path):
    self.path, self.done, self.error_message = path, threading.Event(), ''
    self._error, self._reported = None, False

  def complete(self, error: BaseException | None):
    """Record the result."""
    self._error = error
    if error:
      reason = name_alias(summarize_error(error), self.path.parent)
      self.error_message = f'{self.path} could not be saved: {reason}'
    self.done.set()

  def report_error(self):
    """Print an error once. Raises NonFiniteStateError if the state was not finite."""
    if not self.done.is_set() or not self.error_message:
      return
    if isinstance(self._error, NonFiniteStateError):
      raise NonFiniteStateError(self.error_message)
    if not self._reported:
      print_stderr(self.error_message)
    self._reported = True


def load_newest_params(workdir: Path) -> tuple[dict, int]:
  """Return (parameters, step) of the newest checkpoint, as NumPy arrays.

  The parameters are the moving average if the run has one. Raises UserError if there is no
  checkpoint, and if the newest one is damaged.
  """
  while True:
    step = max(list_saved_steps(workdir / 'checkpoints'), default=None)
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint yet')
    path = workdir / 'checkpoints' / str(step)
    try:
      return next(iter(read_checkpoint_as_numpy(path, 'ema', 'params').values())), step
    except (CorruptCheckpointError, NonFiniteStateError) as error:
      if not path.exists():  # A running trainer has deleted it, and has a newer one.
        continue
      raise UserError(
        f'{path} is damaged: {error}. `vit-jax verify {workdir}` lists the intact checkpoints; '
        'resuming the run moves the others aside'
      ) from None


def list_saved_steps(directory: Path) -> list[int]:
  """Return the steps of the complete checkpoints in a directory, which need not exist."""
  if not directory.is_dir():
    return []
  paths = retry_io(f'listing {directory}', lambda: list(directory.iterdir()))
  return [int(path.name) for path in paths if _is_step_name(path.name)]


def _is_step_name(name: str) -> bool:
  """Return True if the name is a step: a decimal number without leading zeros."""
  return re.fullmatch('0|[1-9][0-9]{0,17}', name) is not None


def _steps_to_keep(steps: list[int], max_to_keep: int, keep_every: int) -> set[int]:
  """Return the newest `max_to_keep` steps and the multiples of `keep_every`."""
  milestones = (step for step in steps if keep_every and step % keep_every == 0)
  return {*sorted(steps)[-max_to_keep:], *milestones}


def _remove_path(path: Path):
  """Remove a file, a link or a directory tree."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
