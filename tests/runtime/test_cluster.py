"""How hosts find each other: flags, environments, a real rendezvous over localhost, and one that somebody misses."""

import threading

import pytest

from vit_jax.errors import MissingHostsError, UserError
from vit_jax.launch.local import free_port
from vit_jax.runtime.cluster import (
  Cluster,
  cluster_from_flags,
  detect_cluster,
  initialize_cluster,
  rendezvous,
)


def test_nothing_said_and_no_cluster_around_is_a_single_process():
  initialize_cluster(coordinator=None, processes=0, process_id=None, timeout=1)
  assert cluster_from_flags(None, 0, None) is None
  assert detect_cluster({}) is None


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('host:1', 0, None), 'set all three, or none'),
    ((None, 2, 0), 'set all three, or none'),
    (('host:1', 2, 2), '--process=2: expected a number from 0 to 1'),
    (('host', 2, 0), '--coordinator=host: expected HOST:PORT'),
  ],
)
def test_flags_that_do_not_go_together_are_errors(flags, message):
  with pytest.raises(UserError, match=message):
    cluster_from_flags(*flags)


def test_tpus_on_gke_are_numbered_by_their_worker_over_all_slices():
  env = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2'}
  assert detect_cluster(env) == Cluster('a:8476', 4, 2)
  slices = {
    'MEGASCALE_NUM_SLICES': '2',
    'MEGASCALE_SLICE_ID': '1',
    'MEGASCALE_COORDINATOR_ADDRESS': 'z:8080',
  }
  assert detect_cluster(env | slices) == Cluster('z:8476', 8, 6)


def test_a_tpu_vm_asks_its_metadata():
  answers = {
    'worker-network-endpoints': 'unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6',
    'agent-worker-number': '1',
  }
  assert detect_cluster({}, answers.get) == Cluster('10.0.0.5:8476', 2, 1)
  assert detect_cluster({}, {}.get) is None


def test_slices_of_a_queued_resource_are_in_the_metadata():
  tpu_env = "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
  answers = {
    'worker-network-endpoints': 'u:u:10.0.0.5,u:u:10.0.0.6',
    'agent-worker-number': '1',
    'tpu-env': tpu_env,
  }
  assert detect_cluster({}, answers.get) == Cluster('10.0.0.9:8476', 4, 3)


@pytest.mark.parametrize(
  ('nodes', 'first'), [('tpu[003-006,9],x', 'tpu003'), ('node7', 'node7'), ('a,b', 'a')]
)
def test_slurm_says_its_nodes_shortened(nodes, first):
  assert detect_cluster(
    {'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_JOB_NODELIST': nodes}
  ) == Cluster(f'{first}:8476', 4, 3)
  assert detect_cluster({'SLURM_NTASKS': '1', 'SLURM_JOB_NODELIST': nodes}) is None


def gather(processes: int, present: list[int], timeout: int) -> dict[int, str]:
  """What each of the processes that are there is told: '' is 'go'."""
  address, said = f'localhost:{free_port()}', {}

  def join(process):
    try:
      rendezvous(Cluster(address, processes, process), timeout)
      said[process] = ''
    except MissingHostsError as error:  # With a code after which `launch` starts it again.
      said[process] = str(error)

  threads = [threading.Thread(target=join, args=(process,)) for process in present]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return said


def test_all_go_once_all_are_there():
  assert gather(4, [3, 1, 0, 2], timeout=20) == dict.fromkeys(range(4), '')


def test_every_host_is_told_who_is_missing(capsys):
  said = gather(4, [0, 2], timeout=4)
  assert said.keys() == {0, 2}
  for text in said.values():
    assert (
      '2 of 4 hosts did not come' in text and ': 1, 3. Start the same command on every host' in text
    )
  assert 'for 2 of 4 hosts: 1, 3' in capsys.readouterr().err


def test_without_the_first_host_the_others_say_so(capsys):
  said = gather(2, [1], timeout=3)
  assert '1 of 2 hosts did not come' in said[1] and 'nobody listens' in said[1]
  assert 'host 1 of 2 is waiting for host 0' in capsys.readouterr().err
