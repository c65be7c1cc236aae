"""What ends a process that is stuck: a thread that waits for signs of life, and shows where all the other threads are.

It runs while the main thread waits inside a collective, for data or for a file system: none of these holds Python's lock.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from vit_jax.errors import EXIT_HANG

_POLL_PERIOD = 0.5  # Seconds between two looks.
_DUMP_TIMEOUT = (
  10  # Seconds to show the stacks and to keep them: the screen or the disk may be what is stuck.
)


class Watchdog:
  """Ends the process where `within` is not called again in time. One that was not started never does."""

  def __init__(self):
    self.record: Callable[[str], None] = lambda text: (
      None
    )  # Where the stacks go, besides the screen.
    self._said = [0.0]

  def start(self, *, alone: bool):
    """With `alone` False, native code that holds Python's lock is ended too; a process that was suspended, then, as well."""
    threading.Thread(target=self._watch, args=(alone,), name='watchdog', daemon=True).start()

  def within(self, seconds: float):
    """A sign of life; the next one is to come within so many seconds. 0: whenever."""
    self._said = [seconds]

  def _watch(self, alone: bool):
    """Counts the seconds in which this thread ran: those in which the whole process was suspended are nobody's fault."""
    said, waited, before = None, 0.0, time.monotonic()
    while True:
      time.sleep(_POLL_PERIOD)
      now = time.monotonic()
      said, waited = (
        (said, waited + min(now - before, 2 * _POLL_PERIOD))
        if said is self._said
        else (self._said, 0.0)
      )
      before = now
      limit = said[0]
      if limit and not alone:
        faulthandler.dump_traceback_later(limit + _DUMP_TIMEOUT, exit=True)
      if limit and waited > limit:
        self._end(limit)

  def _end(self, limit: float):
    last = threading.Timer(_DUMP_TIMEOUT, os._exit, [EXIT_HANG])
    last.daemon = True
    last.start()
    text = f'no sign of life for {limit:g} s; every thread was here:\n{_format_stacks()}'
    print(text, file=sys.stderr, flush=True)
    self.record(text)
    os._exit(EXIT_HANG)


def _format_stacks() -> str:
  """Of all threads, by name."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  frames = sys._current_frames().items()
  return '\n'.join(
    f'{names.get(i, i)}:\n{"".join(traceback.format_stack(frame))}' for i, frame in frames
  )
