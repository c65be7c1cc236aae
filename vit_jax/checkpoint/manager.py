"""The checkpoints of a run, in WORKDIR/checkpoints/STEP: saved in the background, kept as long as asked, and taken up again.

What there is, is what the directory lists: nothing is decided by what was begun, nor by a clock. On several hosts the first one
lists, renames and deletes, and all go on by the same verdict.
"""

import re
import shutil
import threading
import time
from pathlib import Path

import jax

from vit_jax.checkpoint.io import (
  CheckpointWriter,
  CorruptCheckpointError,
  NonFiniteStateError,
  check_checksums,
  read_checkpoint_as_numpy,
  restore_state,
  state_to_dict,
)
from vit_jax.errors import StorageError, UserError
from vit_jax.runtime.cluster import broadcast_first, print_stderr
from vit_jax.runtime.files import RETRY_DELAYS, explain_write_errors, retry_io, summarize_error
from vit_jax.runtime.run_lock import RunLock
from vit_jax.step import TrainState

SAVE_TIMEOUT = (
  1800.0  # Seconds until a checkpoint that is still not written is given up, and the run with it.
)
MAX_FAILED_SAVES = 3  # Saves in a row that may fail before the run ends.
LEFTOVER_NAME = re.compile(
  r'\d+\.(orbax-checkpoint-tmp.*|deleted)'
)  # What an interrupted save, or an interrupted deletion, leaves.


class CheckpointManager:
  """The checkpoints of one run, for the one process (the first, of several hosts) that trains in its directory.

  The newest `keep` and every one at a multiple of `keep_every` are kept. UserError where another process has the directory.
  """

  def __init__(self, workdir: Path, *, keep: int = 1, keep_every: int = 0):
    self._workdir, self._place, self._keep, self._keep_every = (
      workdir,
      workdir / 'checkpoints',
      keep,
      keep_every,
    )
    self._opened, self._lock, self._saving = False, None, None
    self._newest, self._failed, self._problem = (
      -1,
      0,
      '',
    )  # A step; saves in a row that did, and how the last did.
    self._writer = CheckpointWriter()
    if broadcast_first('there' if workdir.exists() else ''):
      self.acquire_directory()

  def acquire_directory(self):
    """Takes the directory for this process, and makes it if need be: at the latest the first save does so."""
    if self._opened:
      return
    problem = ''
    try:
      if jax.process_index() == 0:
        self._take()
    except UserError as error:
      problem = str(error)
    if problem := broadcast_first(problem):
      raise UserError(problem)
    self._opened, self._newest = True, self._find_newest()

  def _take(self):
    with explain_write_errors(self._workdir):
      retry_io(f'creating {self._place}', lambda: self._place.mkdir(parents=True, exist_ok=True))
      self._lock = RunLock(self._workdir)
      self._sweep()

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """Return (state, counters) of the newest intact checkpoint; None if nothing was ever saved.

    The state has the layout of `like` (shapes with shardings), bit for bit. `counters` is the dictionary given to `save`;
    it is empty in checkpoints that were written without one.

    Damaged ones that are newer are named with what is wrong, and moved to checkpoints/damaged. UserError where there are only
    damaged ones, and where a checkpoint holds another architecture (its leaves are listed).
    """
    rejected: dict[int, str] = {}
    while True:
      left = [step for step in list_saved_steps(self._place) if step not in rejected]
      step = int(broadcast_first(str(max(left, default=-1))))
      if step < 0:
        break
      restored, problem = self._try(step, like)
      if not problem:
        self._set_aside(rejected)
        self._newest = step
        return restored
      rejected[step] = problem
      if jax.process_index() == 0:
        print_stderr(f'{self._place / str(step)} is damaged: {problem}')
    if broadcast_first('damaged' if rejected or (self._place / 'damaged').is_dir() else ''):
      raise UserError(
        f'none of the checkpoints in {self._place} is intact, and starting again from step 0 is for you to decide: '
        'choose another --workdir, or remove them'
      )
    return None

  def _try(self, step: int, like: TrainState) -> tuple[tuple[TrainState, dict] | None, str]:
    """Return ((state, counters), '') of a checkpoint, or (None, the reason why it is damaged), the same on all hosts."""
    problem = ''
    try:
      state, expected, counters = restore_state(self._place / str(step), like)
    except CorruptCheckpointError as error:
      problem = str(error)
    if problem := broadcast_first(problem):
      return None, problem
    try:
      check_checksums(state_to_dict(state), expected)
    except (CorruptCheckpointError, NonFiniteStateError) as error:  # The same on all hosts.
      return None, str(error)
    return (state, counters), ''

  def save(self, state: TrainState, step: int, counters: dict | None = None):
    """Copy the state off the devices and write it in the background; do nothing if `step` is the newest saved step.

    `counters` is a small JSON-compatible dictionary of host-side values that is saved with the state.
    ValueError for an older step. StorageError where too many saves in a row have failed, or one does not end; UserError where
    one was of numbers that are not finite.
    """
    self.acquire_directory()
    self.check_for_errors()
    self._settle()
    if step < self._newest:
      raise ValueError(f'step {step} is to be saved, and {self._newest} is saved')
    if step == self._newest:
      return
    if self._failed >= MAX_FAILED_SAVES:
      raise StorageError(
        f'{self._failed} checkpoints in a row could not be saved; the last was {self._problem}'
      )
    saving = _PendingSave(self._place / str(step))
    try:
      self._writer.save(saving.path, state, step, counters or {})
      threading.Thread(target=self._wait, args=(saving,), name='checkpoint', daemon=True).start()
    except OSError as error:
      if jax.process_count() > 1:  # The others wait for this one.
        raise StorageError(f'{saving.path} could not be made: {summarize_error(error)}') from None
      saving.end(error)
    self._saving = saving

  def check_for_errors(self):
    """Says at once what went wrong in the background, if anything did. To be called at every step: it costs nothing.

    UserError where numbers to save were not finite, or another trainer has taken the directory over.
    """
    if self._lock:
      self._lock.check_held()
    if self._saving:
      self._saving.tell()

  def finish(self, state: TrainState, step: int, counters: dict | None = None):
    """The last save, tried again where it fails, and `close`."""
    for pause in (*RETRY_DELAYS, 0):
      self.save(state, step, counters)
      self._settle()
      if not self._problem:
        break
      time.sleep(pause)
    self.close()

  def close(self):
    """Waits until all is written, and lets another process have the directory. StorageError where the last save failed."""
    self._settle()
    self._writer.close()
    if self._lock:
      self._lock.release()
    if self._problem:
      raise StorageError(self._problem)

  def _wait(self, saving: '_PendingSave'):
    """In a thread of its own: for Orbax's to end."""
    try:
      self._writer.wait()
      if jax.process_index() == 0:
        self._delete_old()
      saving.end(None)
    except BaseException as error:  # Whatever it is, it is the main thread's.
      saving.end(error)

  def _settle(self):
    """Waits for the save that goes on, and finds out what came of it: the same on all hosts."""
    if not self._saving:
      return
    if not self._saving.done.wait(SAVE_TIMEOUT):
      raise StorageError(f'{self._saving.path} is still not written after {SAVE_TIMEOUT:.0f} s')
    self._saving.tell()
    problem, step = broadcast_first(self._saving.problem), int(self._saving.path.name)
    self._newest = self._find_newest()
    self._problem = problem if self._newest < step else ''
    self._failed = self._failed + 1 if self._problem else 0
    self._saving = None
    if self._problem and jax.process_index() == 0:
      self._sweep()

  def _find_newest(self) -> int:
    return int(broadcast_first(str(max(list_saved_steps(self._place), default=-1))))

  def _delete_old(self):
    """Each under another name first: a directory whose name is a step is whole. What can't be deleted is told, and stays."""
    there = list_saved_steps(self._place)
    for step in sorted(set(there) - _steps_to_keep(there, self._keep, self._keep_every)):
      gone = self._place / f'{step}.deleted'
      try:
        (self._place / str(step)).rename(gone)
        _remove_path(gone)
      except OSError as error:
        print_stderr(f'could not delete {gone}: {summarize_error(error)}')

  def _sweep(self):
    """Removes what interrupted saves and deletions have left; nobody writes meanwhile."""
    for path in self._place.iterdir():
      if LEFTOVER_NAME.fullmatch(path.name):
        retry_io(f'removing {path}', lambda path=path: _remove_path(path))

  def _set_aside(self, rejected: dict[int, str]):
    """Moves damaged checkpoints to where none is looked for."""
    if not rejected or jax.process_index():
      return
    damaged = self._place / 'damaged'
    damaged.mkdir(exist_ok=True)
    for step in rejected:
      free = next(
        to for i in range(10**6) if not (to := damaged / f'{step}{f"-{i}" if i else ""}').exists()
      )
      retry_io(
        f'moving {step} to {free}',
        lambda step=step, free=free: (self._place / str(step)).rename(free),
      )
      print_stderr(f'{self._place / str(step)} is moved to {free}')


class _PendingSave:
  """A save that goes on."""

  def __init__(self, path: Path):
    self.path, self.done, self.problem, self._error, self._told = (
      path,
      threading.Event(),
      '',
      None,
      False,
    )

  def end(self, error: BaseException | None):
    """What came of it."""
    self._error = error
    self.problem = f'{self.path} could not be saved: {summarize_error(error)}' if error else ''
    self.done.set()

  def tell(self):
    """Says once that it failed, if it did. NotFinite where that is why: going on would help nobody."""
    if not self.done.is_set() or not self.problem:
      return
    if isinstance(self._error, NonFiniteStateError):
      raise NonFiniteStateError(self.problem)
    if not self._told:
      print_stderr(self.problem)
    self._told = True


def load_newest_params(workdir: Path) -> tuple[dict, int]:
  """The parameters (their moving average, if the run keeps one) of the newest checkpoint, as NumPy arrays, and its step.

  UserError where the run has saved nothing yet, and where that checkpoint is not what was saved.
  """
  while True:
    step = max(list_saved_steps(workdir / 'checkpoints'), default=None)
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint yet')
    path = workdir / 'checkpoints' / str(step)
    try:
      return next(iter(read_checkpoint_as_numpy(path, 'ema', 'params').values())), step
    except (CorruptCheckpointError, NonFiniteStateError) as error:
      if path.exists():  # Else a run that goes on has deleted it, and has a newer one.
        raise UserError(
          f'{path} is damaged: {error}. `python -m vit_jax verify {workdir}` says which are good; '
          'a run that goes on there moves the others aside'
        ) from None


def list_saved_steps(place: Path) -> list[int]:
  """Of the checkpoints in a directory, which need not be there: those that have got their names."""
  if not place.is_dir():
    return []
  return [
    int(path.name)
    for path in retry_io(f'listing {place}', lambda: list(place.iterdir()))
    if _is_step_name(path.name)
  ]


def _is_step_name(name: str) -> bool:
  """Whether it is a number as we write it."""
  return re.fullmatch('0|[1-9][0-9]{0,17}', name) is not None


def _steps_to_keep(steps: list[int], keep: int, keep_every: int) -> set[int]:
  """The newest `keep`, and the multiples of `keep_every`."""
  return {
    *sorted(steps)[-keep:],
    *(step for step in steps if keep_every and step % keep_every == 0),
  }


def _remove_path(path: Path):
  """A directory with all that is in it, or a link."""
  shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
