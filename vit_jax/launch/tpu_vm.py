"""Backend `tpu-vm`: one slice as a TPU VM, created at once or not at all."""

import json

from vit_jax.launch.job import Job
from vit_jax.launch.script import HOST_LOG
from vit_jax.launch.states import JobState

TPU_VM_COMMAND = ['gcloud', 'compute', 'tpus', 'tpu-vm']
STOP_SCRIPT = 'sudo sh -c "touch /run/vit_jax/stop; kill -TERM $(cat /run/vit_jax/pid)"'
# cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State
TPU_VM_STATES = {
  'CREATING': 'waiting',
  'STARTING': 'waiting',
  'RESTARTING': 'waiting',
  'REPAIRING': 'waiting',
  'READY': 'active',
}


def create_commands(job: Job, files: str) -> list[list[str]]:
  """Return the commands that create the job. `files` is the folder that contains start.sh."""
  flags = [
    f'--accelerator-type={job.tpu}',
    f'--version={job.accelerator.kind.image}',
    *(['--spot'] if job.spot else []),
  ]
  return [
    [
      *TPU_VM_COMMAND,
      'create',
      job.name,
      *job.location_flags,
      *flags,
      f'--metadata-from-file=startup-script={files}/start.sh',
    ]
  ]


def describe_command(job: Job) -> list[str]:
  """Return the command whose output `parse_state` parses."""
  return [*TPU_VM_COMMAND, 'describe', job.name, *job.location_flags, '--format=json']


def parse_state(text: str) -> JobState:
  """Parse the state, with the name that the cloud gives it."""
  word = json.loads(text).get('state', 'UNKNOWN')
  return JobState(TPU_VM_STATES.get(word, 'lost'), word)


def delete_commands(job: Job) -> list[list[str]]:
  """Return the commands that delete the job."""
  return [[*TPU_VM_COMMAND, 'delete', job.name, *job.location_flags, '--quiet']]


def log_commands(job: Job, seen: dict[str, int]) -> dict[str, list[str]]:
  """Return {prefix: command that follows a host's log}, without the first `seen[prefix]` lines."""
  hosts = [(node, worker) for node in node_names(job) for worker in range(job.accelerator.hosts)]
  follow = lambda host: (
    f'sudo tail --lines=+{seen.get(f"host {host}", 0) + 1} --follow=name --retry {HOST_LOG} '
    '2>/dev/null'
  )
  return {
    f'host {i}': [
      *TPU_VM_COMMAND,
      'ssh',
      node,
      *job.location_flags,
      f'--worker={worker}',
      f'--command={follow(i)}',
    ]
    for i, (node, worker) in enumerate(hosts)
  }


def stop_commands(job: Job) -> list[list[str]]:
  """Return the commands that stop the run and keep the machines."""
  return [
    [*TPU_VM_COMMAND, 'ssh', node, *job.location_flags, '--worker=all', f'--command={STOP_SCRIPT}']
    for node in node_names(job)
  ]


def node_names(job: Job) -> list[str]:
  """Return the names of a job's slices. A queued resource of several slices numbers them."""
  return [job.name] if job.slices == 1 else [f'{job.name}-{i}' for i in range(job.slices)]
