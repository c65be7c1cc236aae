"""Wait until all processes of a run are there, at a socket of process 0.

Each process connects and sends one line, 'vit_jax TOKEN ID', and process 0 answers 'go' or an error
when all have come. A connection that sends anything else, nothing, or that is closed is ignored and
delays no host, be it a port scanner or a process of another run. The token is a digest of the
address, the number of processes and $VIT_JAX_RUN_TOKEN, which `launch` sets to a random word.
"""

import contextlib
import hashlib
import os
import selectors
import socket
import time

from vit_jax.errors import MissingHostsError
from vit_jax.runtime.screen import print_stderr

_REMINDER_PERIOD = 15  # Seconds between two messages about missing hosts.
_HELLO_SECONDS = 10  # A connection that has sent no line by then is closed.
_HELLO_BYTES = 200  # A longer line is not ours.
_MAX_STRANGERS = 256  # Connections without a line that are open at a time.


def meet(host: str, port: int, *, processes: int, process_id: int, timeout: float):
  """Return when every process has called this.

  Raises MissingHostsError that names the missing processes after `timeout` seconds.
  """
  token, deadline = run_token(f'{host}:{port}', processes), time.monotonic() + timeout
  if process_id == 0:
    with socket.create_server(('', port), backlog=1024) as server:
      _Rendezvous(server, f'{host}:{port}', processes, token).serve(deadline)
  else:
    _join(host, port, f'vit_jax {token} {process_id}\n', processes, deadline)


def run_token(address: str, processes: int) -> str:
  """Return the token that the processes of one run share."""
  secret = os.environ.get('VIT_JAX_RUN_TOKEN', '')
  return hashlib.sha256(f'{address} {processes} {secret}'.encode()).hexdigest()[:32]


class _Rendezvous:
  """Process 0's side: connections of processes by their IDs, and those that sent no line yet."""

  def __init__(self, server: socket.socket, address: str, processes: int, token: str):
    self._server, self._address, self._processes = server, address, processes
    self._hello = f'vit_jax {token} '.encode()
    self._selector = selectors.DefaultSelector()
    self._joined: dict[int, socket.socket] = {}
    self._waiting: dict[socket.socket, tuple[float, bytes]] = {}  # (deadline, bytes received).

  def serve(self, deadline: float):
    """Collect the others until all are there, and answer them. See `meet`."""
    self._server.setblocking(False)
    self._selector.register(self._server, selectors.EVENT_READ)
    remind = time.monotonic() + 2
    with self._selector, contextlib.ExitStack() as stack:
      stack.callback(self._close_all)
      while missing := sorted(set(range(1, self._processes)) - self._joined.keys()):
        if time.monotonic() > deadline:
          error = describe_missing(self._address, self._processes, missing)
          self._answer(error)
          raise MissingHostsError(error)
        if time.monotonic() > remind:
          print_stderr(
            f'waiting at {self._address} for {len(missing)} of {self._processes} hosts: '
            f'{format_process_ids(missing)}'
          )
          remind = time.monotonic() + _REMINDER_PERIOD
        for key, _ in self._selector.select(timeout=0.2):
          self._accept() if key.fileobj is self._server else self._read(key.fileobj)
        self._drop_silent()
      self._answer('go')

  def _accept(self):
    with contextlib.suppress(OSError):  # The peer may have gone already.
      connection, _ = self._server.accept()
      connection.setblocking(False)
      self._selector.register(connection, selectors.EVENT_READ)
      self._waiting[connection] = (time.monotonic() + _HELLO_SECONDS, b'')

  def _read(self, connection: socket.socket):
    """Read what has arrived: a part of the line, or the end of the connection."""
    try:
      data = connection.recv(_HELLO_BYTES)
    except BlockingIOError:
      return
    except OSError:
      data = b''
    if not data or connection not in self._waiting:  # Closed, or more than one line.
      self._close(connection)
      return
    deadline, before = self._waiting[connection]
    line, end, rest = (before + data).partition(b'\n')
    if not end and len(line) <= _HELLO_BYTES:
      self._waiting[connection] = (deadline, line)
      return
    process_id = line.removeprefix(self._hello)
    is_ours = line.startswith(self._hello) and process_id.isdigit() and len(process_id) < 10
    if not end or rest or not is_ours or not 0 < int(process_id) < self._processes:
      self._close(connection)
      return
    del self._waiting[connection]
    if old := self._joined.pop(int(process_id), None):  # It was started again.
      self._close(old)
    self._joined[int(process_id)] = connection

  def _drop_silent(self):
    """Close connections whose time is over, and the oldest of too many."""
    now, excess = time.monotonic(), len(self._waiting) - _MAX_STRANGERS
    for i, (connection, (deadline, _)) in enumerate(list(self._waiting.items())):
      if now > deadline or i < excess:
        self._close(connection)

  def _close(self, connection: socket.socket):
    self._selector.unregister(connection)
    connection.close()
    self._waiting.pop(connection, None)
    self._joined = {i: other for i, other in self._joined.items() if other is not connection}

  def _close_all(self):
    for connection in [*self._joined.values(), *self._waiting]:
      connection.close()

  def _answer(self, text: str):
    """Send a line to every process that has joined, ignoring closed connections."""
    for connection in self._joined.values():
      with contextlib.suppress(OSError):
        connection.settimeout(5)
        connection.sendall(f'{text}\n'.encode())


def _join(host: str, port: int, hello: str, processes: int, deadline: float):
  """Send the line to process 0 until it answers 'go' or an error."""
  remind, address = time.monotonic() + 2, f'{host}:{port}'
  while (answer := _request_go(host, port, hello, deadline)) != 'go':
    if answer:
      raise MissingHostsError(answer)
    if time.monotonic() > deadline:
      error = describe_missing(address, processes, [0])
      raise MissingHostsError(f'{error}. No process of this run listens at {address}')
    if time.monotonic() > remind:
      print_stderr(f'{hello.split()[-1]} of {processes} hosts is waiting for host 0 at {address}')
      remind = time.monotonic() + _REMINDER_PERIOD
    time.sleep(0.2)


def _request_go(host: str, port: int, hello: str, deadline: float) -> str:
  """Return the answer of process 0, or '' if it does not listen or has closed the connection."""
  try:
    with socket.create_connection((host, port), timeout=5) as connection:
      connection.settimeout(max(1, deadline - time.monotonic() + 10))
      connection.sendall(hello.encode())
      with connection.makefile() as lines:
        return lines.readline(1024).strip()
  except OSError:
    return ''


def describe_missing(address: str, processes: int, missing: list[int]) -> str:
  """Return the error message that names the missing processes."""
  return (
    f'{len(missing)} of {processes} hosts did not connect to {address}: '
    f'{format_process_ids(missing)}. Start the same command on every host, or raise the '
    'limit with --hosts_timeout=SECONDS'
  )


def format_process_ids(process_ids: list[int]) -> str:
  """Return the first ten, separated by commas."""
  return ', '.join(map(str, process_ids[:10])) + (', …' if len(process_ids) > 10 else '')
