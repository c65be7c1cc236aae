"""Discovery of the hosts of a run, and a rendezvous before JAX is started on them.

If a host is missing, JAX's own initialization aborts without naming it. The hosts therefore first
meet at a socket of host 0, which reports the missing ones (rendezvous.py). Afterwards JAX's
coordination service takes over the port.
"""

import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from urllib.error import URLError
from urllib.request import Request, urlopen

from vit_jax.errors import EXIT_CRASH, EXIT_RESTART, UserError, format_error
from vit_jax.runtime.rendezvous import meet
from vit_jax.runtime.screen import print_stderr

_COORDINATOR_PORT = 8476
_GCE_METADATA_URL = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
_TPU_DEVICE_FILES = (
  '/dev/accel0',
  '/dev/vfio/0',
)  # The first chip of a TPU VM, up to v4 and since v5.
HEARTBEAT_TIMEOUT = 30  # Seconds without a heartbeat after which a host is lost.
_SHUTDOWN_TIMEOUT = 60  # Seconds that a finished host waits for the others.

# Error messages of JAX, its CPU and GPU collectives and Orbax's barriers when a host is lost.
_LOST_HOST_MESSAGE = re.compile(
  r'Gloo .* failed|NCCL|coordination service|CoordinationService'
  r'|[Bb]arrier .*(timed out|failed)|heartbeat'
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
  """The processes of a run: the address of process 0, their number, and the ID of this one."""

  coordinator: str  # HOST:PORT
  processes: int
  process_id: int


def initialize_cluster(
  *,
  coordinator: str | None,
  processes: int,
  process_id: int | None,
  timeout: int,
  heartbeat: int = HEARTBEAT_TIMEOUT,
):
  """Connect this process with the others of the run, before the first device is used.

  The cluster is the one of the arguments, else the TPU pod or SLURM job. A single process returns
  immediately. A host without a heartbeat for `heartbeat` seconds is lost, which ends all others.

  Raises MissingHostsError if hosts are missing after `timeout` seconds.
  """
  cluster = cluster_from_flags(coordinator, processes, process_id) or detect_cluster(os.environ)
  if cluster is None or cluster.processes == 1:
    return
  import jax

  rendezvous(cluster, timeout)
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.processes,
    cluster.process_id,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
  )


def cluster_from_flags(
  coordinator: str | None, processes: int, process_id: int | None
) -> Cluster | None:
  """Return the cluster of the flags, or None without flags. Raises UserError if one is missing."""
  if coordinator is None and process_id is None and processes in (0, 1):
    return None
  if coordinator is None or process_id is None or processes < 1:
    raise UserError(
      '--coordinator=HOST:PORT, --processes=N and --process=I: set all three flags, or none'
    )
  if not 0 <= process_id < processes:
    raise UserError(
      f'--process={process_id}: expected 0 to {processes - 1}, because --processes={processes}'
    )
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise UserError(
      f'--coordinator={coordinator}: expected HOST:PORT, such as 10.0.0.2:{_COORDINATOR_PORT}'
    )
  return Cluster(coordinator, processes, process_id)


def detect_cluster(
  env: Mapping[str, str], read_metadata: Callable[[str], str | None] | None = None
) -> Cluster | None:
  """Return the cluster of TPUs on GKE, of a SLURM job, or of a TPU VM; None for one machine.

  `read_metadata(name)` returns an attribute of a TPU VM, or None if there is none.
  """
  if 'TPU_WORKER_HOSTNAMES' in env and 'TPU_WORKER_ID' in env:
    hosts, worker = env['TPU_WORKER_HOSTNAMES'].split(','), int(env['TPU_WORKER_ID'])
    return _cluster_of_slices(hosts, worker, env)
  if int(env.get('SLURM_NTASKS', '1')) > 1:
    return Cluster(
      f'{_first_slurm_node(env["SLURM_JOB_NODELIST"])}:{_COORDINATOR_PORT}',
      int(env['SLURM_NTASKS']),
      int(env['SLURM_PROCID']),
    )
  on_tpu_vm = any(map(os.path.exists, _TPU_DEVICE_FILES)) and 'TPU_SKIP_MDS_QUERY' not in env
  read_metadata = read_metadata or (_read_gce_metadata if on_tpu_vm else None)
  endpoints = read_metadata('worker-network-endpoints') if read_metadata else None
  if not endpoints:
    return None
  hosts = [endpoint.split(':')[-1] for endpoint in endpoints.split(',')]
  tpu_env = read_metadata('tpu-env') or ''
  slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", tpu_env, flags=re.MULTILINE))
  return _cluster_of_slices(hosts, int(read_metadata('agent-worker-number')), slices | env)


def _cluster_of_slices(hosts: list[str], worker: int, env: Mapping[str, str]) -> Cluster:
  """Return the cluster of one slice with these hosts, or of several equal slices."""
  slices, this = int(env.get('MEGASCALE_NUM_SLICES', '1')), int(env.get('MEGASCALE_SLICE_ID', '0'))
  first = env['MEGASCALE_COORDINATOR_ADDRESS'].partition(':')[0] if slices > 1 else hosts[0]
  return Cluster(f'{first}:{_COORDINATOR_PORT}', slices * len(hosts), this * len(hosts) + worker)


def _first_slurm_node(nodes: str) -> str:
  """Return the first node of SLURM's compact list, such as 'tpu003' of 'tpu[003-006,9],other'."""
  match = re.match(r'([^,\[]+)(?:\[(\d+))?', nodes)
  return match[1] + (match[2] or '')


def _read_gce_metadata(name: str) -> str | None:
  """Return an attribute of this Google Cloud machine, or None if it has none."""
  try:
    with urlopen(
      Request(_GCE_METADATA_URL + name, headers={'Metadata-Flavor': 'Google'}), timeout=5
    ) as response:
      return response.read().decode()
  except (URLError, TimeoutError):
    return None


def rendezvous(cluster: Cluster, timeout: int):
  """Wait until every process has called this.

  Raises MissingHostsError that names the missing processes after `timeout` seconds.
  """
  host, _, port = cluster.coordinator.rpartition(':')
  meet(
    host,
    int(port),
    processes=cluster.processes,
    process_id=cluster.process_id,
    timeout=timeout,
  )


@contextlib.contextmanager
def exit_on_error(processes: int) -> Iterator[None]:
  """End the process immediately if an error occurs inside the context and it has peers.

  An orderly shutdown would wait for the peers, which wait for this process.
  """
  try:
    yield
  except BaseException as error:
    if processes == 1 or isinstance(error, SystemExit):
      raise
    if isinstance(error, UserError):
      print(format_error(error), file=sys.stderr)
    else:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    crash = EXIT_RESTART if is_lost_host_error(error) else EXIT_CRASH
    os._exit(error.exit_code if isinstance(error, UserError) else crash)


def is_lost_host_error(error: BaseException) -> bool:
  """Return True if the error is a failed communication with another host, which has ended."""
  return bool(_LOST_HOST_MESSAGE.search(str(error)))


def broadcast_first(text: str) -> str:
  """Return the first non-empty text of any host, on every host; at most 1024 bytes."""
  import jax  # Slow to import, and not needed for --help.
  import numpy as np
  from jax.experimental.multihost_utils import process_allgather

  if jax.process_count() == 1:
    return text
  line = np.frombuffer(text.encode()[:1024].ljust(1024, b'\0'), np.uint8)
  texts = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in process_allgather(line)]
  return next(filter(None, texts), '')


def print_on_first_host(text: str):
  """Print a line to stderr on host 0 alone. Call it when this process has joined the others."""
  import jax

  if jax.process_index() == 0:
    print_stderr(text)
