"""Several hosts on one machine: processes that train together over localhost."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from vit_jax.errors import EXIT_ABORTED, UserError
from vit_jax.launch.logs import LogFollower

FAILURE_GRACE = 15  # Seconds for the other hosts to end after one has failed.
SIGNAL_GRACE = 30  # Seconds after a signal of the user: the hosts may be saving.


def run_hosts(
  command: list[str], *, hosts: int, devices: int, out: TextIO, env: dict[str, str] | None = None
) -> int:
  """Run a Python command in several processes until all end.

  Each of the `hosts` processes has `devices` simulated CPU devices; with 0, JAX uses what it finds.
  Each line goes to `out` with its host before it. Returns the exit code of the first host that
  fails, which ends the others; Ctrl-C and SIGTERM are passed to all. Raises UserError if the
  command is not a file.
  """
  if command[0] != '-m' and not os.path.isfile(command[0]):  # noqa: PTH113
    raise UserError(
      f'{command[0]} does not exist; expected a script and its flags after --, or -m MODULE'
    )
  follower, coordinator = LogFollower(out), f'localhost:{free_port()}'
  with capture_signals() as signals:
    for i in range(hosts):
      variables = host_environment(coordinator, hosts, i, devices=devices) | (env or {})
      follower.start(f'host {i}', [sys.executable, '-u', *command], os.environ | variables)
    while (
      not signals
      and (codes := follower.exit_codes())
      and None in codes.values()
      and not any(codes.values())
    ):
      time.sleep(0.1)
    failed = {name: code for name, code in follower.exit_codes().items() if code}
    follower.terminate(
      signals[0] if signals else signal.SIGTERM, grace=SIGNAL_GRACE if signals else FAILURE_GRACE
    )
  if signals:
    return 128 + signals[0]
  if not failed:
    return 0
  # The failure of one host makes the others fail at almost the same time. It kills none of them,
  # but JAX may abort them.
  killed = (name for name, code in failed.items() if code > 128 and code != EXIT_ABORTED)
  first = next(killed, None) or next(name for name in follower.finished if name in failed)
  print(f'{first} ended with exit code {failed[first]}', file=sys.stderr)
  return failed[first]


def host_environment(coordinator: str, hosts: int, i: int, *, devices: int) -> dict[str, str]:
  """Return the environment variables that tell a process that it is host `i`."""
  env = {
    'VIT_JAX_COORDINATOR': coordinator,
    'VIT_JAX_PROCESSES': str(hosts),
    'VIT_JAX_PROCESS': str(i),
  }
  if devices:
    flags = re.sub(
      r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', '')
    )
    count = f'--xla_force_host_platform_device_count={devices}'
    env |= {'XLA_FLAGS': f'{flags} {count}'.strip(), 'JAX_PLATFORMS': 'cpu'}
  return env


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
  """Yield a list that receives the numbers of SIGINT and SIGTERM instead of their usual effect."""
  numbers = []
  before = {
    number: signal.signal(number, lambda got, _: numbers.append(got))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield numbers
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def free_port() -> int:
  """Return a port that no process listens on."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]
