"""Write records in a thread, so that storage that fails or hangs neither delays nor ends a run."""

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable

from vit_jax.runtime.files import summarize_error

RETRY_PERIOD = 5.0  # Seconds between two attempts while storage fails.
FLUSH_TIMEOUT = 10.0  # Seconds that `flush` and `close` wait for storage.
CAPACITY = 1000  # Records that wait for storage; later ones are lost.


class BackgroundWriter:
  """Pass items to `write` in their order, from a thread.

  If `write(items)` raises an exception, it is reported once, and the items are passed again after
  `RETRY_PERIOD`. Items beyond `CAPACITY` are counted and lost. No method raises an error of
  `write`, and none waits for it longer than `FLUSH_TIMEOUT`.
  """

  def __init__(self, name: str, write: Callable[[list], None], report: Callable[[str], None]):
    """Start the thread. `name` names the output in the lines that are passed to `report`."""
    self._name, self._write, self._report = name, write, report
    self._items: collections.deque = collections.deque()
    self._changed = threading.Condition()  # Its timeouts do not depend on the clock's time.
    self._closed = self._failing = False
    self._lost, self._reported = 0, set[str]()
    self._thread = threading.Thread(target=self._run, name=f'write {name}', daemon=True)
    self._thread.start()

  def put(self, item):
    """Add an item, or count it as lost if too many wait."""
    with self._changed:
      if self._closed or len(self._items) >= CAPACITY:
        self._lost += 1
        return
      self._items.append(item)
      self._changed.notify_all()

  def flush(self):
    """Wait until all items are written, unless storage fails."""
    with self._changed:
      self._changed.wait_for(lambda: not self._items or self._failing, FLUSH_TIMEOUT)

  def close(self):
    """Attempt once more to write what is left, and report the number of lost items."""
    with self._changed:
      if self._closed:
        return
      self._closed = True
      self._changed.notify_all()
    self._thread.join(FLUSH_TIMEOUT)
    if lost := self._lost + len(self._items):
      self._report_once(f'{self._name} lacks {lost:,} records that could not be written')

  def _run(self):
    closed = False
    while not closed:
      with self._changed:
        if self._failing:
          self._changed.wait_for(lambda: self._closed, RETRY_PERIOD)
        else:
          self._changed.wait_for(lambda: self._items or self._closed)
        batch, closed = list(self._items), self._closed
      error = self._attempt(batch)
      with self._changed:
        for _ in itertools.repeat(None, 0 if error else len(batch)):
          self._items.popleft()
        recovered, self._failing = self._failing and not error, error is not None
        self._changed.notify_all()
      if error:
        self._report_once(
          f'{self._name} cannot be written: {summarize_error(error)}. The run continues, and tries '
          'again'
        )
      elif recovered:
        self._report_once(f'{self._name} is written again')

  def _attempt(self, batch: list) -> Exception | None:
    """Write a batch and return the error, if any."""
    try:
      if batch:
        self._write(batch)
    except Exception as error:  # No error of a writer ends a run.
      return error
    return None

  def _report_once(self, text: str):
    """Report a line, unless its kind was reported before."""
    kind = text.partition(':')[0]
    if kind not in self._reported:
      self._reported.add(kind)
      with contextlib.suppress(OSError):  # The screen may be gone, too.
        self._report(text)
