"""Starts of a run that ended in an error, a file for each host that had one: a run that can't get on is not tried for ever.

    WORKDIR/failures/STEP-START-hostI.txt    The checkpoint that it went on from, which start from there it was; the traceback.

A kill, a preemption, another host's end and what the person can mend leave none. Nothing here goes by a clock.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from vit_jax.errors import CrashLoopError, DivergedError, UserError
from vit_jax.runtime.cluster import is_lost_host_error

MAX_FAILED_STARTS = 3  # Starts from one checkpoint.


class CrashLog:
  """Those of the run in `workdir`. Until `begin` this is the start of who knows what."""

  def __init__(self, workdir: Path, *, host: int):
    self._folder, self._host, self._start = workdir / 'failures', host, 'start'

  def begin(self, step: int):
    """From `step`. CrashLoopError where the last starts from there all failed. On all hosts before any of them goes on."""
    starts = {path.name.split('-')[1] for path in self._folder.glob(f'{step}-*.txt')}
    if len(starts) >= MAX_FAILED_STARTS:
      raise CrashLoopError(
        f'{len(starts)} starts from step {step} ended in an error without a new checkpoint, as {self._folder} tells; '
        'mend the cause, then remove that folder and start again'
      )
    self._start = f'{step}-{len(starts) + 1}'

  def record(self, text: str):
    """Keeps how this start ended, where the file system lets it."""
    with contextlib.suppress(OSError):
      self._folder.mkdir(parents=True, exist_ok=True)
      (self._folder / f'{self._start}-host{self._host}.txt').write_text(text)

  @contextlib.contextmanager
  def recorded(self) -> Iterator[None]:
    """Keeps what goes wrong inside."""
    try:
      yield
    except DivergedError as error:
      self.record(f'{error}\n')
      raise
    except UserError:
      raise
    except Exception as error:
      if not is_lost_host_error(error):
        self.record(traceback.format_exc())
      raise
