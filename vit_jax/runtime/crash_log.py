"""Record crashed starts, so that a run that cannot progress is not restarted forever.

    WORKDIR/failures/STEP-START-hostI.txt

STEP is the checkpoint that the start resumed from and START counts the starts from it. The file
holds the traceback. Kills, preemptions, crashes of other hosts and user errors leave no file.
No clock is involved.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from vit_jax.errors import CrashLoopError, DivergedError, UserError
from vit_jax.runtime.cluster import is_lost_host_error

MAX_FAILED_STARTS = 3  # Crashed starts from one checkpoint before the next start is refused.


class CrashLog:
  """The crash files of one host; before `register_start` the step is unknown."""

  def __init__(self, workdir: Path, *, host: int):
    self._folder, self._host, self._start_name = workdir / 'failures', host, 'start'

  def register_start(self, step: int):
    """Name this start, which resumes from `step`. Every host calls it before any of them trains.

    Raises CrashLoopError if 3 starts from `step` have crashed.
    """
    starts = {path.name.split('-')[1] for path in self._folder.glob(f'{step}-*.txt')}
    if len(starts) >= MAX_FAILED_STARTS:
      raise CrashLoopError(
        f'{len(starts)} starts from step {step} crashed before the next checkpoint; see the '
        f'tracebacks in {self._folder}. Fix the cause, remove that folder, and start again'
      )
    self._start_name = f'{step}-{len(starts) + 1}'

  def write_crash(self, text: str):
    """Write why this start failed; a file system error is ignored.

    A run directory that does not exist, or was removed, is not created.
    """
    with contextlib.suppress(OSError):
      self._folder.mkdir(exist_ok=True)
      path = self._folder / f'{self._start_name}-host{self._host}.txt'
      path.write_text(text, encoding='utf-8', errors='backslashreplace')

  @contextlib.contextmanager
  def record_errors(self) -> Iterator[None]:
    """Write any crash inside the context, and raise it again."""
    try:
      yield
    except DivergedError as error:
      self.write_crash(f'{error}\n')
      raise
    except UserError:
      raise
    except Exception as error:
      if not is_lost_host_error(error):
        self.write_crash(traceback.format_exc())
      raise
