"""What the loop says after each step, and after each batch of an evaluation: that it lives; and asks: whether to stop."""

import collections

import jax

from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog

_MAX_STEPS_IN_FLIGHT = (
  3  # Steps that are given to the devices before the first of them has to be done.
)


class StepMonitor:
  """Of one run. A step may take `quick` seconds, what happens before the first one and between steps `slow`; 0 is no limit."""

  def __init__(self, stopping: Preemption, watchdog: Watchdog, *, quick: float, slow: float):
    self._stopping, self._watchdog, self._quick, self._slow = stopping, watchdog, quick, slow
    self._running = collections.deque()
    self.pause()

  def pause(self):
    """Something begins that is no step."""
    self._watchdog.within(self._slow)

  def asked(self, result) -> bool:
    """Whether to stop after the step that computes `result`. Waits for that of `_MAX_STEPS_IN_FLIGHT` calls ago: devices that are stuck show,
    and are never so many steps behind that stopping takes long."""
    self._running.append(result)
    if len(self._running) > _MAX_STEPS_IN_FLIGHT:
      jax.block_until_ready(self._running.popleft())
    self._watchdog.within(self._quick)
    return self._stopping.asked()
