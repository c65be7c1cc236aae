"""Hosts that find each other before JAX is started on them.

JAX's own wait ends, where a host stays away, in an abort without a word of who is missing. So the hosts first meet at a
socket of the first one, which knows who has come and says so; only then JAX's service takes over the port.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from urllib.error import URLError
from urllib.request import Request, urlopen

from vit_jax.errors import MissingHostsError, UserError
from vit_jax.exits import BUG, RESTART

PORT = 8476
METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
CHIPS = ('/dev/accel0', '/dev/vfio/0')  # The first of a TPU VM, up to v5 and later.
HEARTBEAT = 30  # Seconds without a sign of life from a host after which it is lost.
FAREWELL = 60  # Seconds that a host that is done waits for the others.
REMIND = 15  # Seconds between two lines about hosts that are missing.

# What JAX, its collectives on CPUs and GPUs, and Orbax's barriers say when somebody is gone.
LOST = re.compile(r'Gloo .* failed|NCCL|coordination service|CoordinationService|[Bb]arrier .*(timed out|failed)|heartbeat')


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
  """Where the first of so many processes listens, and which of them this is."""

  coordinator: str  # HOST:PORT
  processes: int
  process: int


def initialize(*, coordinator: str | None, processes: int, process: int | None, timeout: int, heartbeat: int = HEARTBEAT):
  """Joins this process with the others: those that the arguments say, else those of the TPU pod or SLURM job it runs in.

  Alone it does nothing. Before the first use of a device. UserError where hosts are missing after `timeout` seconds. Later a
  host without a sign of life for `heartbeat` seconds is lost, and ends all the others.
  """
  cluster = told(coordinator, processes, process) or found(os.environ)
  if cluster is None or cluster.processes == 1:
    return
  import jax

  meet(cluster, timeout)
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.processes,
    cluster.process,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=FAREWELL,
  )


def told(coordinator: str | None, processes: int, process: int | None) -> Cluster | None:
  """What the flags say, or None where they say nothing. UserError where they don't go together."""
  if coordinator is None and process is None and processes in (0, 1):
    return None
  if coordinator is None or process is None or processes < 1:
    raise UserError('--coordinator=HOST:PORT, --processes=N and --process=I go together: set all three, or none')
  if not 0 <= process < processes:
    raise UserError(f'--process={process}: expected a number from 0 to {processes - 1}, as --processes={processes}')
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise UserError(f'--coordinator={coordinator}: expected HOST:PORT, such as 10.0.0.2:{PORT}')
  return Cluster(coordinator, processes, process)


def found(env: Mapping[str, str], ask: Callable[[str], str | None] | None = None) -> Cluster | None:
  """The cluster that the environment is of: TPUs on GKE, a TPU VM (its metadata is asked), SLURM; None for a single machine."""
  if 'TPU_WORKER_HOSTNAMES' in env and 'TPU_WORKER_ID' in env:
    hosts, worker = env['TPU_WORKER_HOSTNAMES'].split(','), int(env['TPU_WORKER_ID'])
    return over_slices(hosts, worker, env)
  if int(env.get('SLURM_NTASKS', '1')) > 1:
    return Cluster(f'{first_node(env["SLURM_JOB_NODELIST"])}:{PORT}', int(env['SLURM_NTASKS']), int(env['SLURM_PROCID']))
  here = any(map(os.path.exists, CHIPS)) and 'TPU_SKIP_MDS_QUERY' not in env
  ask = ask or (ask_metadata if here else None)
  endpoints = ask('worker-network-endpoints') if ask else None
  if not endpoints:
    return None
  hosts = [endpoint.split(':')[-1] for endpoint in endpoints.split(',')]
  slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", ask('tpu-env') or '', flags=re.MULTILINE))
  return over_slices(hosts, int(ask('agent-worker-number')), slices | env)


def over_slices(hosts: list[str], worker: int, env: Mapping[str, str]) -> Cluster:
  """The cluster of one slice's hosts, or of several equal slices, which the first one's address joins."""
  slices, this = int(env.get('MEGASCALE_NUM_SLICES', '1')), int(env.get('MEGASCALE_SLICE_ID', '0'))
  first = env['MEGASCALE_COORDINATOR_ADDRESS'].partition(':')[0] if slices > 1 else hosts[0]
  return Cluster(f'{first}:{PORT}', slices * len(hosts), this * len(hosts) + worker)


def first_node(nodes: str) -> str:
  """'tpu[003-006,9],other' -> 'tpu003', as SLURM shortens lists of nodes."""
  match = re.match(r'([^,\[]+)(?:\[(\d+))?', nodes)
  return match[1] + (match[2] or '')


def ask_metadata(name: str) -> str | None:
  """An attribute of this Google Cloud machine, or None where it has none."""
  try:
    with urlopen(Request(METADATA + name, headers={'Metadata-Flavor': 'Google'}), timeout=5) as answer:
      return answer.read().decode()
  except (URLError, TimeoutError):
    return None


def meet(cluster: Cluster, timeout: int):
  """Returns once every process has called it. MissingHostsError that names them after `timeout` seconds."""
  host, _, port = cluster.coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  if cluster.process == 0:
    gather(int(port), cluster, deadline)
  else:
    report(host, int(port), cluster, deadline)


def gather(port: int, cluster: Cluster, deadline: float):
  """The first process: listens until each of the others has said its number, then lets all go, or says who is missing."""
  here: dict[int, socket.socket] = {}
  remind = time.monotonic() + 2
  with socket.create_server(('', port)) as server, contextlib.ExitStack() as connections:
    server.settimeout(0.2)
    while missing := sorted(set(range(1, cluster.processes)) - here.keys()):
      if time.monotonic() > deadline:
        error = too_late(cluster, missing)
        tell(here, error)
        raise MissingHostsError(error)
      if time.monotonic() > remind:
        say(f'waiting at {cluster.coordinator} for {len(missing)} of {cluster.processes} hosts: {words(missing)}')
        remind = time.monotonic() + REMIND
      with contextlib.suppress(TimeoutError, ValueError):
        connection = connections.enter_context(server.accept()[0])
        here[number_of(connection)] = connection
    tell(here, 'go')


def number_of(connection: socket.socket) -> int:
  """What a process that has come says first."""
  connection.settimeout(5)
  with connection.makefile() as lines:
    return int(lines.readline())


def tell(here: dict[int, socket.socket], text: str):
  """A line for every process that has come; one that has gone again is told nothing."""
  for connection in here.values():
    with contextlib.suppress(OSError):
      connection.sendall(f'{text}\n'.encode())


def report(host: str, port: int, cluster: Cluster, deadline: float):
  """Another process: says its number to the first, and waits for its word."""
  remind = time.monotonic() + 2
  while (answer := ask_first(host, port, cluster.process, deadline)) != 'go':
    if answer:
      raise MissingHostsError(answer)
    if time.monotonic() > deadline:
      raise MissingHostsError(f'{too_late(cluster, [0])}; nobody listens at {cluster.coordinator}')
    if time.monotonic() > remind:
      say(f'host {cluster.process} of {cluster.processes} is waiting for host 0 at {cluster.coordinator}')
      remind = time.monotonic() + REMIND
    time.sleep(0.2)


def ask_first(host: str, port: int, process: int, deadline: float) -> str:
  """What the first process says to this one, or '' where it is not there or has gone."""
  try:
    with socket.create_connection((host, port), timeout=5) as connection:
      connection.settimeout(max(1, deadline - time.monotonic() + 10))
      connection.sendall(f'{process}\n'.encode())
      with connection.makefile() as lines:
        return lines.readline().strip()
  except OSError:
    return ''


def too_late(cluster: Cluster, missing: list[int]) -> str:
  """The last word of a wait."""
  return (
    f'{len(missing)} of {cluster.processes} hosts did not come to {cluster.coordinator}: {words(missing)}. '
    'Start the same command on every host, or give them longer with --hosts_timeout=SECONDS'
  )


def words(numbers: list[int]) -> str:
  """The first ten."""
  return ', '.join(map(str, numbers[:10])) + (', …' if len(numbers) > 10 else '')


def say(text: str):
  """A line for the person."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def parting(processes: int) -> Iterator[None]:
  """An error in here ends a process that has peers at once: in good order it would wait for them, and they for it."""
  try:
    yield
  except BaseException as error:
    if processes == 1 or isinstance(error, SystemExit):
      raise
    if isinstance(error, UserError):
      print(f'error: {error}', file=sys.stderr)
    else:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else RESTART if lost_a_host(error) else BUG)


def lost_a_host(error: BaseException) -> bool:
  """Whether what failed is the talk with another host, which has then ended before."""
  return bool(LOST.search(str(error)))
