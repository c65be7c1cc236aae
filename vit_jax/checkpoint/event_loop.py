"""Let Orbax finish what it has begun to read, after one array could not be read.

Orbax reads all arrays at once in an event loop, and closes it at the first error. TensorStore's
threads then report the other arrays to a closed loop: dozens of tracebacks on stderr.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_DRAIN_TIMEOUT = 60.0  # Seconds to wait for the other arrays.
_lock = threading.RLock()  # The policy belongs to the process.


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


@contextlib.contextmanager
def draining_event_loops() -> Iterator[None]:
  """Finish the tasks of event loops that are created inside, before they are closed."""
  with _lock:
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_DrainingPolicy())
    try:
      yield
    finally:
      asyncio.set_event_loop_policy(policy)
