"""Commands that run side by side, each line of theirs with the name of whose it is: '[host 1] step 100/2700 …'."""

import collections
import contextlib
import os
import signal
import subprocess
import threading
import time
from typing import TextIO


class Followed:
  """Processes by their names. `seen` counts the lines of each; `ended` names those that are done, in order."""

  def __init__(self, out: TextIO):
    self._out = out
    self.seen, self.ended = collections.Counter(), []
    self._running, self._readers, self._lock = {}, [], threading.Lock()

  def start(self, name: str, command: list[str], env: dict[str, str] | None = None):
    """Starts one, out of reach of the terminal's Ctrl-C: that is ours to pass on."""
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

  def codes(self) -> dict[str, int | None]:
    """{name: its exit code as a shell says it, None while it runs}."""
    as_shell = lambda code: 128 - code if code is not None and code < 0 else code
    return {name: as_shell(process.poll()) for name, process in self._running.items()}

  def end(self, number: int = signal.SIGTERM, grace: float = 5):
    """Sends a signal to all that still run, and kills those that are there `grace` seconds later."""
    self._send(number)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and None in self.codes().values():
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
    """What a process says, line by line, to its end."""
    with process.stdout as lines:
      for line in lines:
        self.seen[name] += 1
        if line.startswith(b'[Gloo] '):  # It greets each of its peers, again and again.
          continue
        text = line.decode(errors='replace').rstrip('\n')
        with self._lock:
          print(f'[{name}] {text}' if name else text, flush=True, file=self._out)
    process.wait()
    self.ended.append(name)
