"""End a process that hangs, after printing the stacks of all its threads.

A thread waits for signs of progress. It runs while the main thread waits in a collective, for data
or for a file system, because none of these holds Python's global interpreter lock.
"""

import collections
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from vit_jax.errors import EXIT_HANG

_POLL_PERIOD = 0.5  # Seconds between two checks.
_DUMP_TIMEOUT = 10  # Seconds for printing and storing the stacks; the screen or disk may hang too.
_MAX_STEPS_IN_FLIGHT = 3  # Dispatched steps before the loop waits for the oldest one.


class Watchdog:
  """End the process with `EXIT_HANG` if it is not armed again in time; inactive until `start`.

  `on_hang(text)` is called with the stacks of all threads before the process ends.
  """

  def __init__(self):
    self.on_hang: Callable[[str], None] = lambda text: None
    self._armed = [0.0]  # Time limit in seconds. A new list each time, so that identity tells.
    self._step_timeout = self._slow_timeout = 0.0
    self._in_flight = collections.deque()

  def start(self, *, single_process: bool):
    """Start the thread.

    With `single_process=False`, native code that holds the interpreter lock is ended too. A process
    that was suspended for longer than the limit is then ended as well.
    """
    threading.Thread(
      target=self._watch, args=(single_process,), name='watchdog', daemon=True
    ).start()

  def arm(self, seconds: float):
    """Report progress and allow `seconds` until the next report; 0 disables the limit."""
    self._armed = [seconds]

  def set_timeouts(self, *, step: float, slow: float):
    """Set the limits of one run, in seconds, and arm the slow one; 0 disables a limit.

    `step` limits a training step or one batch of an evaluation. `slow` limits all other work, such
    as compilation, restoring and saving.
    """
    self._step_timeout, self._slow_timeout = step, slow
    self._in_flight.clear()
    self.arm_slow()

  def arm_slow(self):
    """Report that work other than a step begins, and allow the slow limit for it."""
    self.arm(self._slow_timeout)

  def step_done(self, result):
    """Report that the step that computes `result` was dispatched, and arm the step limit.

    Waits for the result of 3 calls ago. The host therefore notices a hanging device, and never runs
    so far ahead of the devices that stopping takes long.
    """
    import jax  # Slow to import, and not needed for --help.

    self._in_flight.append(result)
    if len(self._in_flight) > _MAX_STEPS_IN_FLIGHT:
      jax.block_until_ready(self._in_flight.popleft())
    self.arm(self._step_timeout)

  def _watch(self, single_process: bool):
    """Check the time limit forever.

    Only time in which this thread runs is counted. A suspended process is not hanging.
    """
    armed, waited, before = None, 0.0, time.monotonic()
    while True:
      time.sleep(_POLL_PERIOD)
      now = time.monotonic()
      if armed is self._armed:
        waited += min(now - before, 2 * _POLL_PERIOD)
      else:
        armed, waited = self._armed, 0.0
      before = now
      limit = armed[0]
      if not single_process:
        faulthandler.cancel_dump_traceback_later()
        if limit:
          faulthandler.dump_traceback_later(limit + _DUMP_TIMEOUT, exit=True)
      if limit and waited > limit:
        self._dump_and_exit(limit)

  def _dump_and_exit(self, limit: float):
    exit_timer = threading.Timer(_DUMP_TIMEOUT, os._exit, [EXIT_HANG])
    exit_timer.daemon = True
    exit_timer.start()
    text = f'no progress for {limit:g} s; stacks of all threads:\n{_format_stacks()}'
    print(text, file=sys.stderr, flush=True)
    self.on_hang(text)
    os._exit(EXIT_HANG)


def _format_stacks() -> str:
  """Return the stack of every thread under the thread's name."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  frames = sys._current_frames().items()
  return '\n'.join(
    f'{names.get(i, i)}:\n{"".join(traceback.format_stack(frame))}' for i, frame in frames
  )
