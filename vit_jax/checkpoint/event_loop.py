"""Let Orbax finish what it has begun, after one array could not be read or written.

Orbax handles all arrays at once in an event loop, and closes it at the first error. TensorStore's
threads then report the other arrays to a closed loop: dozens of tracebacks on stderr.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_DRAIN_TIMEOUT = 60.0  # Seconds to wait for the other arrays.


class _DrainingEventLoop(asyncio.SelectorEventLoop):
  """Event loop that waits for its unfinished tasks before it is closed."""

  def close(self):
    if not self.is_running() and not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      done, _ = self.run_until_complete(asyncio.wait(tasks, timeout=_DRAIN_TIMEOUT))
      for task in done:  # asyncio logs an exception that is never read.
        _ = task.cancelled() or task.exception()
    super().close()


class _DrainingPolicy(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    """Return a loop that waits for its unfinished tasks before it is closed."""
    return _DrainingEventLoop()


class _SharedPolicy:
  """The policy of this process, which is set as long as it has a user: reads and saves overlap."""

  def __init__(self):
    self._lock, self._users, self._previous = threading.Lock(), 0, None

  def acquire(self):
    """Set the policy, unless it has another user already."""
    with self._lock:
      if not self._users:
        self._previous = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_DrainingPolicy())
      self._users += 1

  def release(self):
    """Set the policy before it again, unless it has another user."""
    with self._lock:
      self._users -= 1
      if not self._users:
        asyncio.set_event_loop_policy(self._previous)


_shared_policy = _SharedPolicy()


@contextlib.contextmanager
def draining_event_loops() -> Iterator[None]:
  """Finish the tasks of event loops that are created inside, before they are closed."""
  _shared_policy.acquire()
  try:
    yield
  finally:
    _shared_policy.release()
