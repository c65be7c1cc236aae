"""The babysitter, with a stand-in that replays the states of a cloud."""

import dataclasses
import json

import pytest

from vit_jax.cli.launch import parse_verb_arguments
from vit_jax.errors import UserError
from vit_jax.launch.bundle import write_start_files
from vit_jax.launch.job import Job, load_job, save_job
from vit_jax.launch.manage import run_verb
from vit_jax.launch.watch import Babysitter, PollSchedule

JOB = Job(
  name='b16', backend='queued', tpu='v5litepod-16', slices=1, spot=True, project='paper', zone='us-west4-a', cluster='',
  workdir='gs://runs/b16', data='', env={}, command=('run_pretrain.py', '--workdir=/mnt/workdir'), commit='abc', python='3.11',
)  # fmt: skip
PACE = PollSchedule(poll=0.01, first=0.01, longest=0.04)
NOT_FOUND = [
  1,
  '',
  'ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: it does not exist.\n',
]
STOCKOUT = [
  1,
  '',
  'ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: There is no more '
  'capacity in the zone.\n',
]
DENIED = [
  1,
  '',
  "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/paper'.\n",
]
QUOTA = [
  1,
  '',
  "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded.\n",
]
FOUR = [0, '0\n0\n0\n0\n', '']
NONE = [1, '', 'ERROR: The following URLs matched no objects or files\n']


def states(*words: str):
  return [[0, json.dumps({'state': {'state': word}}), ''] for word in words]


def failed(message: str):
  return [
    0,
    json.dumps({'state': {'state': 'FAILED', 'failedData': {'error': {'message': message}}}}),
    '',
  ]


def watch(job, tmp_path, *, create=True):
  files = tmp_path / 'files'
  files.mkdir()
  write_start_files(job, str(files))
  return Babysitter(job, str(files), schedule=PACE).watch(create=create)


def verbs(cloud):
  """Return the verbs of the commands that changed the queued resource."""
  return [call[4] for call in cloud.calls('queued-resources') if call[4] != 'describe']


def test_the_machines_of_a_successful_run_are_deleted(cloud, tmp_path, capfd):
  cloud.play(
    describe=states('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'),
    exits=[NONE, FOUR],
    ssh=[[0, 'step 1\n', '']],
  )
  assert watch(JOB, tmp_path) == 0
  assert verbs(cloud) == ['create', 'delete']
  out, err = capfd.readouterr()
  assert {f'[host {i}] step 1' for i in range(4)} <= set(out.splitlines())
  assert [
    word in err for word in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'done on 4 hosts')
  ] == [True] * 4


@pytest.mark.parametrize('lost', ['SUSPENDED', 'SUSPENDING'])
def test_preempted_machines_are_deleted_and_requested_again(cloud, tmp_path, capfd, lost):
  cloud.play(describe=states('ACTIVE', lost, 'WAITING_FOR_RESOURCES', 'ACTIVE'), exits=[NONE, FOUR])
  assert watch(JOB, tmp_path) == 0
  assert verbs(cloud) == ['create', 'delete', 'create', 'delete']
  first, second = cloud.calls('queued-resources', 'create')
  assert first == second
  assert (
    f'it was {lost.lower()}: trying again in 0.01 s (the run resumes from its last checkpoint)'
    in capfd.readouterr().err
  )
  assert cloud.calls('rm', 'gs://runs/b16/launch/b16/exit/*')


def test_machines_are_requested_again_with_growing_delays_if_the_zone_has_none(
  cloud, tmp_path, capfd
):
  cloud.play(create=[STOCKOUT] * 4 + [[0, '', '']], describe=states('ACTIVE'), exits=[FOUR])
  assert watch(JOB, tmp_path) == 0
  assert verbs(cloud) == ['create'] * 5 + ['delete']
  lines = [
    line for line in capfd.readouterr().err.splitlines() if 'the zone has no capacity' in line
  ]
  assert [line.split(' in ')[1].split(' s')[0] for line in lines] == [
    '0.01',
    '0.02',
    '0.04',
    '0.04',
  ]
  assert 'another --zone' in lines[0]


def test_a_request_that_failed_for_lack_of_capacity_is_made_again(cloud, tmp_path):
  cloud.play(
    describe=[failed('There is no more capacity in the zone "us-west4-a"'), *states('ACTIVE')],
    exits=[FOUR],
  )
  assert watch(JOB, tmp_path) == 0
  assert verbs(cloud) == ['create', 'delete', 'create', 'delete']


REFUSED = {
  'permission '
  'denied': ({'create': [DENIED]}, r'^b16: permission denied: .*roles/tpu.admin.*ERROR: PERM'),
  'permission to describe': ({'describe': [DENIED]}, 'permission denied: .*gcloud config list'),
  'quota': ({'create': [QUOTA]}, 'over the quota: '),
  'quota, reported late': ({'describe': [failed('Quota exceeded')]}, 'over the quota'),
  'no login': ({'create': [[1, '', 'ERROR: You do not currently have an active account '
                                   'selected.']]}, 'gcloud auth login'),
  'API': ({'create': [[1, '', 'ERROR: Cloud TPU API has not been used in project '
                              '1.']]}, 'services enable'),
  'name exists': ({'create': [[1, '', 'ERROR: ALREADY_EXISTS: Resource already '
                                'exists']]}, 'the name is taken: `launch watch NAME`'),
  'deleted': ({'describe': [NOT_FOUND]}, '^b16 '),
  'another error': ({'create': [[1, '', 'ERROR: INVALID_ARGUMENT: x\nand '
                               'more\n']]}, r'^b16: ERROR: INVALID_ARGUMENT: x$'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_an_error_that_a_retry_cannot_fix_is_one_line_with_a_remedy(cloud, tmp_path, case):
  answers, message = REFUSED[case]
  cloud.play(**answers)
  with pytest.raises(UserError, match=message) as error:
    watch(JOB, tmp_path)
  assert '\n' not in str(error.value)


def test_a_failed_run_leaves_its_machines_and_prints_that_they_exist(cloud, tmp_path, capfd):
  cloud.play(describe=states('ACTIVE'), exits=[NONE, [0, '1\n', '']])
  assert watch(JOB, tmp_path) == 1
  assert verbs(cloud) == ['create']
  assert '1 of 4 hosts failed, exit code 1. The machines still exist' in capfd.readouterr().err


def test_a_stopped_run_leaves_its_machines_and_prints_that_they_exist(cloud, tmp_path, capfd):
  cloud.play(
    describe=states('ACTIVE'), exits=[NONE, [0, '75\n75\n', ''], [0, '75\n75\n75\n75\n', '']]
  )
  assert watch(JOB, tmp_path) == 75
  assert verbs(cloud) == ['create']
  assert 'stopped on 4 hosts. The machines still exist' in capfd.readouterr().err


def test_hosts_that_fail_because_one_was_preempted_are_restarted(cloud, tmp_path):
  cloud.play(
    describe=states('ACTIVE', 'ACTIVE', 'SUSPENDING', 'ACTIVE'),
    exits=[[0, '134\n', ''], [0, '134\n', ''], FOUR],
  )
  assert watch(JOB, tmp_path) == 0
  assert verbs(cloud) == ['create', 'delete', 'create', 'delete']


def test_an_interrupted_log_continues_at_the_next_line(cloud, tmp_path):
  cloud.play(describe=states('ACTIVE'), exits=[*[NONE] * 30, FOUR], ssh=[[0, 'a\nb\n', '']])
  assert watch(JOB, tmp_path) == 0
  starts = [call[-1].split('--lines=+')[1].split()[0] for call in cloud.calls('ssh', '--worker=0')]
  assert starts[:2] == ['1', '3']


def test_a_tpu_vm_that_is_preempted_is_created_again(cloud, tmp_path):
  played = [
    [0, json.dumps({'state': state}), ''] for state in ('CREATING', 'READY', 'PREEMPTED', 'READY')
  ]
  cloud.play(vm=played, exits=[NONE, FOUR])
  assert watch(dataclasses.replace(JOB, backend='tpu-vm'), tmp_path) == 0
  done = [call[4] for call in cloud.calls('tpu-vm') if call[4] in ('create', 'delete')]
  assert done == ['create', 'delete', 'create', 'delete']


GKE = dataclasses.replace(JOB, backend='gke', cluster='tpus', data='gs://sets/all')


def jobset(*, ready: int = 0, condition: str = '', restarts: int = 0):
  conditions = (
    [{'type': condition, 'status': 'True', 'message': 'job b16-slice-job-0 failed'}]
    if condition
    else []
  )
  status = {
    'conditions': conditions,
    'restarts': restarts,
    'replicatedJobsStatus': [{'ready': ready}],
  }
  return [0, json.dumps({'status': status}), '']


def test_a_jobset_is_followed_until_it_is_complete(cloud, tmp_path, capfd):
  played = [
    jobset(),
    jobset(ready=1),
    jobset(restarts=1),
    jobset(ready=1, restarts=1),
    jobset(condition='Completed'),
  ]
  cloud.play(jobset=played, pods=[[0, '[pod/b16-slice-job-0-0-x/jax-tpu] step 1\n', '']])
  assert watch(GKE, tmp_path) == 0
  out, err = capfd.readouterr()
  assert '[pod/b16-slice-job-0-0-x/jax-tpu] step 1' in out.splitlines()
  assert 'Running, restarted 1 times' in err
  assert [call[1:3] for call in cloud.calls('xpk')] == [['storage', 'attach']] * 2 + [
    ['workload', 'create']
  ]


def test_a_failed_jobset_is_an_error_with_the_command_for_details(cloud, tmp_path):
  cloud.play(jobset=[jobset(condition='Failed')])
  with pytest.raises(
    UserError,
    match='b16 failed: job b16-slice-job-0 failed. `kubectl describe jobset b16` has details',
  ):
    watch(GKE, tmp_path)


def do(verb, *rest):
  return run_verb(verb, parse_verb_arguments(verb, ['b16', *rest]))


def test_status_logs_stop_and_delete_take_the_name_of_a_job(cloud, capfd):
  save_job(JOB)
  cloud.play(describe=states('ACTIVE'), ssh=[[0, 'step 1\n', '']])
  assert do('status') == 0
  first, second = capfd.readouterr().out.splitlines()
  assert (
    first == 'b16  ACTIVE  1 x v5litepod-16 spot (queued, us-west4-a)  gs://runs/b16  commit abc'
  )
  assert second == '  python run_pretrain.py --workdir=/mnt/workdir'
  assert do('logs') == 0
  assert '[host 3] step 1' in capfd.readouterr().out.splitlines()
  assert do('stop') == 0
  assert 'kill -TERM' in cloud.calls('ssh', '--worker=all')[0][-1]
  assert do('delete', '--yes') == 0
  assert verbs(cloud) == ['delete']
  with pytest.raises(UserError, match='b16'):
    load_job('b16')


def test_delete_needs_a_confirmation(cloud, monkeypatch):
  save_job(JOB)
  cloud.play()
  with pytest.raises(UserError, match='--yes'):
    do('delete')
  monkeypatch.setattr('sys.stdin.isatty', lambda: True)
  monkeypatch.setattr('builtins.input', lambda question: 'n')
  assert do('delete') == 1
  assert not cloud.calls()
  assert load_job('b16') == JOB


def test_two_slices_on_gke_are_deleted_with_their_volumes(cloud):
  save_job(dataclasses.replace(GKE, slices=2))
  cloud.play()
  assert do('delete', '--yes') == 0
  assert [call[1:3] for call in cloud.calls()] == [
    ['workload', 'delete'],
    ['storage', 'detach'],
    ['storage', 'detach'],
  ]
