"""Measure how long the devices wait for data.

The host runs ahead of the devices, so the time that it waits for a batch is not what the devices
lose. They lose the time from the end of their last step to the arrival of the batch. A thread waits
for the ends of the steps, so that the training loop does not.
"""

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

T = TypeVar('T')

HIGH_SHARE = 0.05  # Of the time. A larger share is worth a line on the screen.


class DataWait:
  """Adds up the seconds in which the devices of this host had no step to compute."""

  def __init__(self):
    self._dispatched, self._seconds = 0, 0.0
    self._completed = 0, math.inf  # The last completed step, and when.
    self._results: queue.SimpleQueue = queue.SimpleQueue()

  def step_dispatched(self, result):
    """Report that the step that computes `result` was dispatched. This waits for nothing."""
    self._dispatched += 1
    self._results.put((self._dispatched, result))

  def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches, and measure the waits for them."""
    threading.Thread(target=self._watch_steps, name='data wait', daemon=True).start()
    try:
      while True:
        began = time.monotonic()
        with jax.profiler.TraceAnnotation('next_batch'):
          batch = next(batches)
        step, completed = self._completed
        if step == self._dispatched:
          self._seconds += max(0.0, time.monotonic() - max(began, completed))
        yield batch
    finally:
      self._results.put(None)

  def lap(self) -> float:
    """Return the seconds since the last lap, of the host that waited longest."""
    seconds, self._seconds = self._seconds, 0.0
    if jax.process_count() == 1:
      return seconds
    return float(process_allgather(np.float32(seconds)).max())

  def _watch_steps(self):
    while (item := self._results.get()) is not None:
      step, result = item
      try:
        jax.block_until_ready(result)
      except Exception:  # The training loop meets the same error, and handles it.
        return
      self._completed = step, time.monotonic()


def describe_wait(share: float, *, workers: int, threads: int) -> str:
  """Return a line about devices that waited for data, and what helps."""
  return (
    f'the devices waited for data {share:.0%} of the time: more config.data.workers (now '
    f'{workers}) or config.data.threads (now {threads or "automatic"}), smaller image files or a '
    'faster disk would help'
  )
