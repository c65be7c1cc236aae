"""Stopping when told to: SIGTERM, with which platforms announce that a machine is taken away, and SIGINT, which is Ctrl-C.

Before the first step there is nothing to save, and the process ends at once. After it all hosts save after the same step,
whichever of them was told. SIGTERM twice is SIGTERM once; Ctrl-C twice ends the process now. A thread answers: Python's own
handlers would wait until the main thread is done with compiling.
"""

import collections
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

from vit_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART

_SIGNAL_EXIT_CODES = {signal.SIGTERM: EXIT_RESTART, signal.SIGINT: EXIT_INTERRUPTED}
_VOTE_LAG = (
  2  # Questions to the other hosts that are on their way before the first answer is waited for.
)


class Preemption:
  """Whether this run has been told to stop. One that does not listen is never told."""

  def __init__(self):
    self._told, self._vote, self._votes = None, None, collections.deque()
    self._listens = self._begun = False
    self.more = False  # Whether another run follows when this one is complete.

  def listen(self):
    """Takes the place of what the signals usually do, for as long as the process lives. In the main thread, before others.

    All threads and processes that are started from here on leave them to the one that answers.
    """
    self._listens = True
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for number in _SIGNAL_EXIT_CODES:
      signal.signal(number, lambda *_: None)
      signal.siginterrupt(number, False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=self._answer, args=(ours, theirs), name='signals', daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNAL_EXIT_CODES)

  def begin(self, vote: Callable[[bool], object] | None = None):
    """From here on there is something to save. On several hosts `vote` says whether any of them was told."""
    self._begun, self._vote = True, vote

  def asked(self) -> bool:
    """Whether to stop here: the same on all hosts, all of which ask equally often. They agree `_VOTE_LAG` questions later."""
    told = self._told is not None
    if self._vote is None:
      return told
    self._votes.append(self._vote(told))
    return len(self._votes) > _VOTE_LAG and bool(self._votes.popleft())

  def end(self):
    """The run is complete: there is nothing to save until the next begins, or a SIGTERM comes too late to matter."""
    if self.more:
      self._begun, self._vote = False, None
      self._votes.clear()
    elif self._listens:
      signal.signal(signal.SIGTERM, signal.SIG_IGN)

  @property
  def exit_code(self) -> int:
    """Of a run that has stopped."""
    return _SIGNAL_EXIT_CODES.get(self._told, EXIT_RESTART)

  def _answer(self, ours: socket.socket, theirs: socket.socket):
    """Reads the numbers of signals as they come; `theirs` is held so that it stays open."""
    del theirs
    interrupts = 0
    while number := ours.recv(1)[0]:
      if number not in _SIGNAL_EXIT_CODES:
        continue
      interrupts += number == signal.SIGINT
      name = signal.Signals(number).name
      if not self._begun or interrupts > 1:
        _write_stderr_unbuffered(
          f'{name}: {"stopping now" if self._begun else "there is nothing to save yet"}'
        )
        os._exit(_SIGNAL_EXIT_CODES[number])
      if self._told is None:
        self._told = number
        _write_stderr_unbuffered(f'{name}: saving and stopping')


def _write_stderr_unbuffered(text: str):
  """A line for the person, past Python's buffer, which another thread may hold."""
  with contextlib.suppress(OSError):
    os.write(2, f'{text}\n'.encode())
