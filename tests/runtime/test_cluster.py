"""Cluster discovery from flags and environments, and the rendezvous over localhost."""

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


def test_without_flags_and_cluster_there_is_a_single_process():
  initialize_cluster(coordinator=None, processes=0, process_id=None, timeout=1)
  assert cluster_from_flags(None, 0, None) is None
  assert detect_cluster({}) is None


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('host:1', 0, None), '--coordinator.*--processes.*--process'),
    ((None, 2, 0), '--coordinator.*--processes.*--process'),
    (('host:1', 2, 2), '--process=2'),
    (('host', 2, 0), '--coordinator=host: .*HOST:PORT'),
  ],
)
def test_incomplete_or_invalid_flags_are_errors(flags, message):
  with pytest.raises(UserError, match=message):
    cluster_from_flags(*flags)


def test_process_ids_of_tpus_on_gke_run_over_all_slices():
  env = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2'}
  assert detect_cluster(env) == Cluster('a:8476', 4, 2)
  slices = {
    'MEGASCALE_NUM_SLICES': '2',
    'MEGASCALE_SLICE_ID': '1',
    'MEGASCALE_COORDINATOR_ADDRESS': 'z:8080',
  }
  assert detect_cluster(env | slices) == Cluster('z:8476', 8, 6)


def test_the_cluster_of_a_tpu_vm_comes_from_its_metadata():
  answers = {
    'worker-network-endpoints': 'unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6',
    'agent-worker-number': '1',
  }
  assert detect_cluster({}, answers.get) == Cluster('10.0.0.5:8476', 2, 1)
  assert detect_cluster({}, {}.get) is None


def test_the_slices_of_a_queued_resource_come_from_the_metadata():
  tpu_env = (
    "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\nMEGASCALE_NUM_SLICES: "
    "'2'\nMEGASCALE_SLICE_ID: '1'\n"
  )
  answers = {
    'worker-network-endpoints': 'u:u:10.0.0.5,u:u:10.0.0.6',
    'agent-worker-number': '1',
    'tpu-env': tpu_env,
  }
  assert detect_cluster({}, answers.get) == Cluster('10.0.0.9:8476', 4, 3)


@pytest.mark.parametrize(
  ('nodes', 'first'), [('tpu[003-006,9],x', 'tpu003'), ('node7', 'node7'), ('a,b', 'a')]
)
def test_the_first_node_of_a_slurm_list_is_the_coordinator(nodes, first):
  assert detect_cluster(
    {'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_JOB_NODELIST': nodes}
  ) == Cluster(f'{first}:8476', 4, 3)
  assert detect_cluster({'SLURM_NTASKS': '1', 'SLURM_JOB_NODELIST': nodes}) is None


def rendezvous_errors(processes: int, present: list[int], timeout: int) -> dict[int, str]:
  """Return the error of each process in `present`, '' if its rendezvous succeeds."""
  address, errors = f'localhost:{free_port()}', {}

  def join(process_id):
    try:
      rendezvous(Cluster(address, processes, process_id), timeout)
      errors[process_id] = ''
    except MissingHostsError as error:
      errors[process_id] = str(error)

  threads = [threading.Thread(target=join, args=(i,)) for i in present]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return errors


def test_the_rendezvous_succeeds_when_all_processes_join():
  assert rendezvous_errors(4, [3, 1, 0, 2], timeout=20) == dict.fromkeys(range(4), '')


def test_every_host_reports_the_missing_hosts(capsys):
  errors = rendezvous_errors(4, [0, 2], timeout=4)
  assert errors.keys() == {0, 2}
  for text in errors.values():
    assert '2 of 4 hosts' in text and ': 1, 3.' in text
  assert 'for 2 of 4 hosts: 1, 3' in capsys.readouterr().err


def test_without_host_0_the_others_report_it_as_missing(capsys):
  errors = rendezvous_errors(2, [1], timeout=3)
  assert '1 of 2 hosts' in errors[1] and ': 0.' in errors[1]
  assert 'waiting for host 0' in capsys.readouterr().err
