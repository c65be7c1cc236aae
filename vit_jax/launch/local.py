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

from vit_jax.errors import RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch.environment import new_run_token
from vit_jax.launch.logs import LogFollower

CAUSE_GRACE = 3  # Seconds for the host that is the cause to end, after one that lost it has ended.
FAILURE_GRACE = 15  # Seconds for the other hosts to end after one has failed.
SIGNAL_GRACE = 30  # Seconds after a signal of the user: the hosts may be saving.


def run_hosts(
  command: list[str], *, hosts: int, devices: int, out: TextIO, env: dict[str, str] | None = None
) -> int:
  """Run a Python command in several processes until all end.

  Each of the `hosts` processes has `devices` simulated CPU devices; with 0, JAX uses what it finds.
  Each line goes to `out` with its host before it. The first host that fails ends the others, and
  Ctrl-C, SIGTERM and SIGHUP are passed to all. Returns the exit code of the host that caused the
  failure (see `find_cause`). Raises UserError if the command is not a file.
  """
  if command[0] != '-m' and not os.path.isfile(command[0]):  # noqa: PTH113
    raise UserError(
      f'{command[0]} does not exist; expected a script and its flags after --, or -m MODULE'
    )
  follower, coordinator = LogFollower(out), f'localhost:{free_port()}'
  env = new_run_token() | (env or {})
  with capture_signals() as signals:
    for i in range(hosts):
      variables = host_environment(coordinator, hosts, i, devices=devices) | env
      follower.start(f'host {i}', [sys.executable, '-u', *command], os.environ | variables)
    while (
      not signals
      and (codes := follower.exit_codes())
      and None in codes.values()
      and not any(codes.values())
    ):
      time.sleep(0.1)
    failed = wait_for_cause(follower) if any(follower.exit_codes().values()) else {}
    follower.terminate(
      signals[0] if signals else signal.SIGTERM, grace=SIGNAL_GRACE if signals else FAILURE_GRACE
    )
  if signals:
    return 128 + signals[0]
  if not failed:
    return 0
  cause = find_cause(failed, follower.finished)
  print(f'{cause} ended with exit code {failed[cause]}', file=sys.stderr)
  return failed[cause]


def wait_for_cause(follower: LogFollower) -> dict[str, int]:
  """Return {name: exit code} of the failed hosts as soon as one of them is a cause.

  A host that lost another may be seen to end first. The wait is at most CAUSE_GRACE seconds.
  """
  deadline = time.monotonic() + CAUSE_GRACE
  while True:
    failed = {name: code for name, code in follower.exit_codes().items() if code}
    if set(failed.values()) - set(RESTARTABLE_EXIT_CODES) or time.monotonic() > deadline:
      return failed
    time.sleep(0.1)


def find_cause(failed: dict[str, int], finished: list[str]) -> str:
  """Return the name of the host whose failure made the others fail.

  The failure of one host makes the others fail at almost the same time, and their order is not
  certain. The others end with one of RESTARTABLE_EXIT_CODES. A host that a signal killed comes
  before one that ended by itself, and then the first in `finished`.
  """
  order = [name for name in finished if name in failed] + list(failed)
  causes = [name for name in order if failed[name] not in RESTARTABLE_EXIT_CODES]
  killed = [name for name in causes if failed[name] > 128]
  return (killed or causes or order)[0]


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
  """Yield a list that receives the numbers of signals that end a process.

  SIGHUP is left alone if it is ignored, as with `nohup`.
  """
  numbers = []
  before = {
    number: signal.signal(number, lambda got, _: numbers.append(got))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
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
