"""The rendezvous of processes beside strangers that connect to its port."""

import contextlib
import socket
import struct
import threading
import time

import pytest

from vit_jax.errors import MissingHostsError
from vit_jax.launch.local import free_port
from vit_jax.runtime import rendezvous
from vit_jax.runtime.rendezvous import meet, run_token


@pytest.fixture
def server():
  """Start process 0 of three, which waits. Yield (port, start(process_id), errors)."""
  port, errors, threads = free_port(), {}, []

  def start(process_id: int, timeout: float = 60):
    def run():
      try:
        meet('localhost', port, processes=3, process_id=process_id, timeout=timeout)
        errors[process_id] = ''
      except MissingHostsError as error:
        errors[process_id] = str(error)

    threads.append(threading.Thread(target=run, daemon=True))
    threads[-1].start()

  def join() -> dict[int, str]:
    for thread in threads:
      thread.join(90)
    return errors

  return port, start, join


def connect(port: int) -> socket.socket:
  deadline = time.monotonic() + 20
  while True:
    with contextlib.suppress(OSError):
      return socket.create_connection(('localhost', port), timeout=5)
    assert time.monotonic() < deadline
    time.sleep(0.05)


def reset(connection: socket.socket):
  """Close a connection with a reset instead of an orderly end."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
  connection.close()


def hello(port: int, process_id: object, *, processes: int = 3) -> bytes:
  return f'vit_jax {run_token(f"localhost:{port}", processes)} {process_id}\n'.encode()


STRANGERS = {
  'a plain number': lambda port: b'1\n',
  'a port scanner': lambda port: b'GET / HTTP/1.1\r\nHost: x\r\n\r\n',
  'another run': lambda port: hello(port, 1, processes=4),
  'an ID that is out of range': lambda port: hello(port, 3),
  'the ID of process 0': lambda port: hello(port, 0),
  'a negative ID': lambda port: hello(port, -1),
  'a long line': lambda port: b'x' * 100_000,
  'bytes that are not text': lambda port: b'\xff\0\xff\n',
  'two lines': lambda port: hello(port, 1) + hello(port, 2),
}


@pytest.mark.parametrize('stranger', STRANGERS)
def test_a_stranger_is_not_counted_as_a_host_and_ends_nothing(server, stranger):
  port, start, join = server
  start(0)
  with connect(port) as connection, contextlib.suppress(OSError):
    connection.sendall(STRANGERS[stranger](port))
    assert connection.recv(100) == b''  # Closed without an answer.
  start(1)
  start(2)
  assert join() == {0: '', 1: '', 2: ''}


def test_connections_that_are_reset_or_silent_delay_nobody(server):
  port, start, join = server
  start(0)
  silent = [connect(port) for _ in range(20)]
  for connection in silent[:5]:
    reset(connection)
  for connection in silent[5:10]:
    connection.sendall(b'vit_jax')  # A line without its end.
  began = time.monotonic()
  start(1)
  start(2)
  assert join() == {0: '', 1: '', 2: ''}
  assert time.monotonic() - began < 60  # In sequence, they would take longer.
  for connection in silent:
    connection.close()


def test_a_connection_that_drips_bytes_does_not_extend_the_timeout(server):
  port, start, join = server
  start(0, timeout=3)
  stop = threading.Event()

  def drip():
    with connect(port) as connection, contextlib.suppress(OSError):
      while not stop.wait(0.1):
        connection.sendall(b'1')

  thread = threading.Thread(target=drip, daemon=True)
  thread.start()
  errors = join()
  stop.set()
  thread.join(20)
  assert '2 of 3 hosts' in errors[0] and ': 1, 2.' in errors[0]


def test_a_process_that_left_and_came_again_counts_once(server):
  port, start, join = server
  start(0)
  first = connect(port)
  first.sendall(hello(port, 1))
  reset(first)
  start(1)
  start(2)
  assert join() == {0: '', 1: '', 2: ''}


def test_the_token_depends_on_the_secret_of_the_run(monkeypatch):
  before = run_token('host:1', 2)
  monkeypatch.setenv('VIT_JAX_RUN_TOKEN', 'secret')
  assert len({before, run_token('host:1', 2), run_token('host:1', 3), run_token('host:2', 2)}) == 4


def test_of_many_silent_connections_the_oldest_are_closed(server, monkeypatch):
  monkeypatch.setattr(rendezvous, '_MAX_STRANGERS', 2)
  port, start, join = server
  start(0)
  silent = [connect(port) for _ in range(6)]
  silent[0].settimeout(20)
  assert silent[0].recv(1) == b''
  start(1)
  start(2)
  assert join() == {0: '', 1: '', 2: ''}
  for connection in silent:
    connection.close()
