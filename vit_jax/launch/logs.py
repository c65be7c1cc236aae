"""Commands that run in parallel, with the name of the command before each line.

'[host 1] step 100/2700 …'.
"""

import collections
import contextlib
import os
import signal
import subprocess
import threading
import time
from typing import TextIO


class LogFollower:
  """Runs commands and prints their output.

  `lines_seen` counts the lines of each command; `finished` lists the ended ones in order.
  """

  def __init__(self, out: TextIO):
    self._out = out
    self.lines_seen, self.finished = collections.Counter(), []
    self._running, self._readers, self._lock = {}, [], threading.Lock()

  def start(self, name: str, command: list[str], env: dict[str, str] | None = None):
    """Start a command in its own session, out of reach of the terminal's Ctrl-C."""
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      env=env,
    )
    self._running[name] = process
    reader = threading.Thread(target=self._read, args=(name, process), daemon=True)
    reader.start()
    self._readers.append(reader)

  def exit_codes(self) -> dict[str, int | None]:
    """Return {name: exit code as a shell reports it, or None while the command runs}."""
    as_shell = lambda code: 128 - code if code is not None and code < 0 else code
    return {name: as_shell(process.poll()) for name, process in self._running.items()}

  def terminate(self, number: int = signal.SIGTERM, grace: float = 5):
    """Send a signal to all running commands, and kill the rest `grace` seconds later."""
    self._send(number)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and None in self.exit_codes().values():
      time.sleep(0.05)
    self._send(signal.SIGKILL)
    for process in self._running.values():
      process.wait()
    for reader in self._readers:
      reader.join(timeout=5)

  def _send(self, number: int):
    for process in self._running.values():
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)

  def _read(self, name: str, process: subprocess.Popen):
    with process.stdout as lines:
      for line in lines:
        self.lines_seen[name] += 1
        if line.startswith(b'[Gloo] '):  # Gloo announces each connection.
          continue
        text = line.decode(errors='replace').rstrip('\n')
        with self._lock:
          print(f'[{name}] {text}' if name else text, flush=True, file=self._out)
    process.wait()
    self.finished.append(name)
