"""Several hosts on this one machine: the same command in as many processes, which train together over localhost."""

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
from vit_jax.launch.logs import Followed

GRACE = 15  # Seconds that the others have to end by themselves once one has failed.
ASKED = 30  # … and when the person ends them all: they may be saving.


def run_hosts(
  command: list[str], *, hosts: int, devices: int, out: TextIO, env: dict[str, str] | None = None
) -> int:
  """Runs the Python `command` in `hosts` processes of `devices` simulated CPU devices each (0: what JAX finds) until all end.

  Each line goes to `out` with its host before it. Returns the exit code of the first host that fails, which takes the others
  with it; Ctrl-C and SIGTERM go on to all. UserError where the command is no file.
  """
  if command[0] != '-m' and not os.path.isfile(command[0]):  # noqa: PTH113
    raise UserError(
      f'{command[0]}: there is no such file; expected a script and its flags after --, or -m MODULE'
    )
  everyone, coordinator = Followed(out), f'localhost:{free_port()}'
  with received() as signals:
    for i in range(hosts):
      said = environment(coordinator, hosts, i, devices=devices) | (env or {})
      everyone.start(f'host {i}', [sys.executable, '-u', *command], os.environ | said)
    while (
      not signals
      and (codes := everyone.codes())
      and None in codes.values()
      and not any(codes.values())
    ):
      time.sleep(0.1)
    failed = {name: code for name, code in everyone.codes().items() if code}
    everyone.end(signals[0] if signals else signal.SIGTERM, grace=ASKED if signals else GRACE)
  if signals:
    return 128 + signals[0]
  if not failed:
    return 0
  # The others fail of its failing, at almost the same time; none of them is killed by that, but JAX may abort them.
  killed = (name for name, code in failed.items() if code > 128 and code != EXIT_ABORTED)
  first = next(killed, None) or next(name for name in everyone.ended if name in failed)
  print(f'{first} ended with exit code {failed[first]}', file=sys.stderr)
  return failed[first]


def environment(coordinator: str, hosts: int, i: int, *, devices: int) -> dict[str, str]:
  """What host `i` is told."""
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
def received() -> Iterator[list[int]]:
  """A list that the numbers of SIGINT and SIGTERM come into, in place of what they usually do."""
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
  """One that nobody listens at."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]
