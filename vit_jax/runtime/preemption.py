"""Save and exit on SIGTERM, SIGHUP and SIGINT. Trace the next steps on SIGUSR1.

Platforms send SIGTERM before they take a machine away. A terminal that is closed sends SIGHUP,
which counts as SIGTERM unless the process was started to ignore it, as by `nohup`. SIGINT is
Ctrl-C. Before the first step
there is nothing to save, and the process exits immediately. Afterwards all hosts save after the
same step, no matter which of them got the signal. A second SIGTERM has no effect; a second Ctrl-C
ends the process immediately. A thread handles the signals, because Python runs its own handlers in
the main thread, which may be busy compiling.

SIGUSR1 to one host asks all hosts for a trace of the same steps (profiler.py). It never ends the
process.
"""

import collections
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

from vit_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART

_SIGNAL_EXIT_CODES = {
  signal.SIGTERM: EXIT_RESTART,
  signal.SIGHUP: EXIT_RESTART,
  signal.SIGINT: EXIT_INTERRUPTED,
}
_VOTE_LAG = 2  # Votes that are in flight before the result of the oldest one is read.
_NOTHING, _TRACE, _STOP = range(3)  # Votes. The largest of any host wins.


class Preemption:
  """Signals that ask this run to stop; none is noticed before `install_handlers`.

  Attributes:
    has_next_stage: True if another run follows in this process when the current one is complete.
  """

  def __init__(self):
    self._signal, self._largest, self._pending_votes = None, None, collections.deque()
    self._installed = self._can_save = self._trace_due = False
    self._trace_signals = self._seen_trace_signals = 0
    self.has_next_stage = False

  def install_handlers(self):
    """Handle the signals in a thread for the rest of the process.

    Call it in the main thread before other threads and processes are started: they inherit the
    blocked signals and leave them to the thread.
    """
    self._installed = True
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = {*_SIGNAL_EXIT_CODES, signal.SIGUSR1}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
      numbers.remove(signal.SIGHUP)
    for number in numbers:
      signal.signal(number, lambda *_: None)
      signal.siginterrupt(number, False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
      target=self._handle_signals, args=(reader, writer), name='signals', daemon=True
    ).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

  def start_saving(self, largest: Callable[[int], object] | None = None):
    """Declare that there is state to save from now on.

    With several hosts, `largest(number)` starts a vote and returns a lazy number: the largest of
    all hosts.
    """
    self._can_save, self._largest = True, largest

  def should_stop(self) -> bool:
    """Return True if the run should save and stop here, the same on all hosts.

    All hosts have to call it equally often. With several hosts the answer lags by 2 calls, so that
    no step waits for a vote.
    """
    signals = self._trace_signals
    vote = _TRACE if signals != self._seen_trace_signals else _NOTHING
    self._seen_trace_signals = signals
    vote = vote if self._signal is None else _STOP
    if self._largest is not None:
      self._pending_votes.append(self._largest(vote))
      ready = len(self._pending_votes) > _VOTE_LAG
      vote = int(self._pending_votes.popleft()) if ready else _NOTHING
    self._trace_due |= vote == _TRACE
    return vote == _STOP

  def take_trace_request(self) -> bool:
    """Return True, once, after SIGUSR1 asked for a trace, at the same step on all hosts.

    `should_stop` has to be called between two steps.
    """
    due, self._trace_due = self._trace_due, False
    return due

  def stop_saving(self):
    """Declare that the run is complete, so that nothing is left to save.

    If another stage follows, a signal exits immediately until its `start_saving`. Otherwise
    SIGTERM and SIGHUP are ignored, because they come too late to matter.
    """
    if self.has_next_stage:
      self._can_save, self._largest = False, None
      self._pending_votes.clear()
    elif self._installed:
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
      signal.signal(signal.SIGHUP, signal.SIG_IGN)

  @property
  def exit_code(self) -> int:
    """The exit code of a run that has stopped: 130 after Ctrl-C, else 75."""
    return _SIGNAL_EXIT_CODES.get(self._signal, EXIT_RESTART)

  def _handle_signals(self, reader: socket.socket, writer: socket.socket):
    """Read signal numbers from `reader` forever; `writer` is a parameter so that it stays open."""
    del writer
    interrupts = 0
    while number := reader.recv(1)[0]:
      self._trace_signals += number == signal.SIGUSR1
      if number not in _SIGNAL_EXIT_CODES:
        continue
      interrupts += number == signal.SIGINT
      name = signal.Signals(number).name
      if not self._can_save or interrupts > 1:
        outcome = 'stopping now' if self._can_save else 'there is nothing to save yet'
        _write_stderr_unbuffered(f'{name}: {outcome}')
        os._exit(_SIGNAL_EXIT_CODES[number])
      if self._signal is None:
        self._signal = number
        _write_stderr_unbuffered(f'{name}: saving and stopping')


def _write_stderr_unbuffered(text: str):
  """Write a line to stderr past Python's buffer, whose lock another thread may hold."""
  with contextlib.suppress(OSError):
    os.write(2, f'{text}\n'.encode())
