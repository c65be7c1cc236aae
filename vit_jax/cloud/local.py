"""Several hosts on this one machine: the same command in as many processes, which train together over localhost."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO

from vit_jax.errors import UserError

GRACE = 15  # Seconds that the others have to end by themselves once one has failed.


def run_hosts(command: list[str], *, hosts: int, devices: int, out: TextIO) -> int:
  """Runs the Python `command` in `hosts` processes of `devices` simulated CPU devices each (0: what JAX finds) until all end.

  Each line goes to `out` with its host before it. Returns the first exit code that is not 0, whose host takes the others
  with it; Ctrl-C reaches all. UserError where the command is no file.
  """
  if command[0] != '-m' and not os.path.isfile(command[0]):  # noqa: PTH113
    raise UserError(f'{command[0]}: there is no such file; expected a script and its flags after --, or -m MODULE')
  coordinator = f'localhost:{free_port()}'
  running = [start(command, coordinator, hosts, i, devices) for i in range(hosts)]
  readers = [threading.Thread(target=relay, args=(process, i, out)) for i, process in enumerate(running)]
  for reader in readers:
    reader.start()
  try:
    code = first_failure(running)
  except KeyboardInterrupt:
    code = 130
  if code:
    end(running)
  for reader in readers:
    reader.join()
  return code


def start(command: list[str], coordinator: str, hosts: int, i: int, devices: int) -> subprocess.Popen:
  """Host `i`."""
  env = os.environ | {'VIT_JAX_COORDINATOR': coordinator, 'VIT_JAX_PROCESSES': str(hosts), 'VIT_JAX_PROCESS': str(i)}
  if devices:
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', env.get('XLA_FLAGS', ''))
    env |= {'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}', 'JAX_PLATFORMS': 'cpu'}
  arguments = [sys.executable, '-u', *command]
  return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')


def relay(process: subprocess.Popen, i: int, out: TextIO):
  """Copies what a host says."""
  with process.stdout as lines:
    for line in lines:
      out.write(f'[host {i}] {line}')
      out.flush()


def first_failure(running: list[subprocess.Popen]) -> int:
  """Waits until all have ended well (0) or one has not: its exit code, as a shell gives it."""
  while True:
    codes = [process.poll() for process in running]
    if failed := [code for code in codes if code]:
      return failed[0] if failed[0] > 0 else 128 - failed[0]
    if None not in codes:
      return 0
    time.sleep(0.1)


def end(running: list[subprocess.Popen]):
  """Ends those that are left, at first politely."""
  deadline = time.monotonic() + GRACE
  for process in running:
    process.terminate()
  for process in running:
    try:
      process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def free_port() -> int:
  """One that nobody listens at."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]
