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

from vit_jax.errors import EXIT_CRASH, EXIT_RESTART, MissingHostsError, UserError

_COORDINATOR_PORT = 8476
_GCE_METADATA_URL = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
_TPU_DEVICE_FILES = ('/dev/accel0', '/dev/vfio/0')  # The first of a TPU VM, up to v5 and later.
HEARTBEAT_TIMEOUT = 30  # Seconds without a sign of life from a host after which it is lost.
_SHUTDOWN_TIMEOUT = 60  # Seconds that a host that is done waits for the others.
_REMINDER_PERIOD = 15  # Seconds between two lines about hosts that are missing.

# What JAX, its collectives on CPUs and GPUs, and Orbax's barriers say when somebody is gone.
_LOST_HOST_MESSAGE = re.compile(
  r'Gloo .* failed|NCCL|coordination service|CoordinationService|[Bb]arrier .*(timed out|failed)|heartbeat'
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
  """Where the first of so many processes listens, and which of them this is."""

  coordinator: str  # HOST:PORT
  processes: int
  process: int


def initialize_cluster(
  *,
  coordinator: str | None,
  processes: int,
  process: int | None,
  timeout: int,
  heartbeat: int = HEARTBEAT_TIMEOUT,
):
  """Joins this process with the others: those that the arguments say, else those of the TPU pod or SLURM job it runs in.

  Alone it does nothing. Before the first use of a device. UserError where hosts are missing after `timeout` seconds. Later a
  host without a sign of life for `heartbeat` seconds is lost, and ends all the others.
  """
  cluster = cluster_from_flags(coordinator, processes, process) or detect_cluster(os.environ)
  if cluster is None or cluster.processes == 1:
    return
  import jax

  rendezvous(cluster, timeout)
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.processes,
    cluster.process,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
  )


def cluster_from_flags(
  coordinator: str | None, processes: int, process: int | None
) -> Cluster | None:
  """What the flags say, or None where they say nothing. UserError where they don't go together."""
  if coordinator is None and process is None and processes in (0, 1):
    return None
  if coordinator is None or process is None or processes < 1:
    raise UserError(
      '--coordinator=HOST:PORT, --processes=N and --process=I go together: set all three, or none'
    )
  if not 0 <= process < processes:
    raise UserError(
      f'--process={process}: expected a number from 0 to {processes - 1}, as --processes={processes}'
    )
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise UserError(
      f'--coordinator={coordinator}: expected HOST:PORT, such as 10.0.0.2:{_COORDINATOR_PORT}'
    )
  return Cluster(coordinator, processes, process)


def detect_cluster(
  env: Mapping[str, str], ask: Callable[[str], str | None] | None = None
) -> Cluster | None:
  """The cluster that the environment is of: TPUs on GKE, a TPU VM (its metadata is asked), SLURM; None for a single machine."""
  if 'TPU_WORKER_HOSTNAMES' in env and 'TPU_WORKER_ID' in env:
    hosts, worker = env['TPU_WORKER_HOSTNAMES'].split(','), int(env['TPU_WORKER_ID'])
    return _cluster_of_slices(hosts, worker, env)
  if int(env.get('SLURM_NTASKS', '1')) > 1:
    return Cluster(
      f'{_first_slurm_node(env["SLURM_JOB_NODELIST"])}:{_COORDINATOR_PORT}',
      int(env['SLURM_NTASKS']),
      int(env['SLURM_PROCID']),
    )
  here = any(map(os.path.exists, _TPU_DEVICE_FILES)) and 'TPU_SKIP_MDS_QUERY' not in env
  ask = ask or (_read_gce_metadata if here else None)
  endpoints = ask('worker-network-endpoints') if ask else None
  if not endpoints:
    return None
  hosts = [endpoint.split(':')[-1] for endpoint in endpoints.split(',')]
  slices = dict(
    re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", ask('tpu-env') or '', flags=re.MULTILINE)
  )
  return _cluster_of_slices(hosts, int(ask('agent-worker-number')), slices | env)


def _cluster_of_slices(hosts: list[str], worker: int, env: Mapping[str, str]) -> Cluster:
  """The cluster of one slice's hosts, or of several equal slices, which the first one's address joins."""
  slices, this = int(env.get('MEGASCALE_NUM_SLICES', '1')), int(env.get('MEGASCALE_SLICE_ID', '0'))
  first = env['MEGASCALE_COORDINATOR_ADDRESS'].partition(':')[0] if slices > 1 else hosts[0]
  return Cluster(f'{first}:{_COORDINATOR_PORT}', slices * len(hosts), this * len(hosts) + worker)


def _first_slurm_node(nodes: str) -> str:
  """'tpu[003-006,9],other' -> 'tpu003', as SLURM shortens lists of nodes."""
  match = re.match(r'([^,\[]+)(?:\[(\d+))?', nodes)
  return match[1] + (match[2] or '')


def _read_gce_metadata(name: str) -> str | None:
  """An attribute of this Google Cloud machine, or None where it has none."""
  try:
    with urlopen(
      Request(_GCE_METADATA_URL + name, headers={'Metadata-Flavor': 'Google'}), timeout=5
    ) as answer:
      return answer.read().decode()
  except (URLError, TimeoutError):
    return None


def rendezvous(cluster: Cluster, timeout: int):
  """Returns once every process has called it. MissingHostsError that names them after `timeout` seconds."""
  host, _, port = cluster.coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  if cluster.process == 0:
    _serve_rendezvous(int(port), cluster, deadline)
  else:
    _join_rendezvous(host, int(port), cluster, deadline)


def _serve_rendezvous(port: int, cluster: Cluster, deadline: float):
  """The first process: listens until each of the others has said its number, then lets all go, or says who is missing."""
  here: dict[int, socket.socket] = {}
  remind = time.monotonic() + 2
  with socket.create_server(('', port)) as server, contextlib.ExitStack() as connections:
    server.settimeout(0.2)
    while missing := sorted(set(range(1, cluster.processes)) - here.keys()):
      if time.monotonic() > deadline:
        error = _format_timeout_message(cluster, missing)
        _send_line_to_all(here, error)
        raise MissingHostsError(error)
      if time.monotonic() > remind:
        print_stderr(
          f'waiting at {cluster.coordinator} for {len(missing)} of {cluster.processes} hosts: {_format_process_ids(missing)}'
        )
        remind = time.monotonic() + _REMINDER_PERIOD
      with contextlib.suppress(TimeoutError, ValueError):
        connection = connections.enter_context(server.accept()[0])
        here[_read_process_id(connection)] = connection
    _send_line_to_all(here, 'go')


def _read_process_id(connection: socket.socket) -> int:
  """What a process that has come says first."""
  connection.settimeout(5)
  with connection.makefile() as lines:
    return int(lines.readline())


def _send_line_to_all(here: dict[int, socket.socket], text: str):
  """A line for every process that has come; one that has gone again is told nothing."""
  for connection in here.values():
    with contextlib.suppress(OSError):
      connection.sendall(f'{text}\n'.encode())


def _join_rendezvous(host: str, port: int, cluster: Cluster, deadline: float):
  """Another process: says its number to the first, and waits for its word."""
  remind = time.monotonic() + 2
  while (answer := _request_go(host, port, cluster.process, deadline)) != 'go':
    if answer:
      raise MissingHostsError(answer)
    if time.monotonic() > deadline:
      raise MissingHostsError(
        f'{_format_timeout_message(cluster, [0])}; nobody listens at {cluster.coordinator}'
      )
    if time.monotonic() > remind:
      print_stderr(
        f'host {cluster.process} of {cluster.processes} is waiting for host 0 at {cluster.coordinator}'
      )
      remind = time.monotonic() + _REMINDER_PERIOD
    time.sleep(0.2)


def _request_go(host: str, port: int, process: int, deadline: float) -> str:
  """What the first process says to this one, or '' where it is not there or has gone."""
  try:
    with socket.create_connection((host, port), timeout=5) as connection:
      connection.settimeout(max(1, deadline - time.monotonic() + 10))
      connection.sendall(f'{process}\n'.encode())
      with connection.makefile() as lines:
        return lines.readline().strip()
  except OSError:
    return ''


def _format_timeout_message(cluster: Cluster, missing: list[int]) -> str:
  """The last word of a wait."""
  return (
    f'{len(missing)} of {cluster.processes} hosts did not come to {cluster.coordinator}: {_format_process_ids(missing)}. '
    'Start the same command on every host, or give them longer with --hosts_timeout=SECONDS'
  )


def _format_process_ids(numbers: list[int]) -> str:
  """The first ten."""
  return ', '.join(map(str, numbers[:10])) + (', …' if len(numbers) > 10 else '')


def print_stderr(text: str):
  """A line for the person."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def exit_on_error(processes: int) -> Iterator[None]:
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
    os._exit(
      error.exit_code
      if isinstance(error, UserError)
      else EXIT_RESTART
      if is_lost_host_error(error)
      else EXIT_CRASH
    )


def is_lost_host_error(error: BaseException) -> bool:
  """Whether what failed is the talk with another host, which has then ended before."""
  return bool(_LOST_HOST_MESSAGE.search(str(error)))


def broadcast_first(text: str) -> str:
  """Of what the hosts say, what the first that says anything says: all get the same."""
  import jax  # Slow to import, and not needed for --help.
  import numpy as np
  from jax.experimental.multihost_utils import process_allgather

  if jax.process_count() == 1:
    return text
  line = np.frombuffer(text.encode()[:1024].ljust(1024, b'\0'), np.uint8)
  said = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in process_allgather(line)]
  return next(filter(None, said), '')
