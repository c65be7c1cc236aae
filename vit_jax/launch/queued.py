"""Backend `queued`: slices as a queued resource.

It waits for machines, and is suspended when they are preempted.
"""

import json

from vit_jax.launch.job import Job
from vit_jax.launch.states import JobState
from vit_jax.launch.tpu_vm import log_commands, node_names, stop_commands

# The interface of a backend; logs and stopping are those of a TPU VM.
__all__ = [
  'create_commands',
  'delete_commands',
  'describe_command',
  'log_commands',
  'parse_state',
  'stop_commands',
]

QUEUED_RESOURCES_COMMAND = ['gcloud', 'compute', 'tpus', 'queued-resources']
# cloud.google.com/tpu/docs/queued-resources; ACCEPTED is an older name of WAITING_FOR_RESOURCES.
QUEUED_STATES = {
  'CREATING': 'waiting',
  'ACCEPTED': 'waiting',
  'WAITING_FOR_RESOURCES': 'waiting',
  'PROVISIONING': 'waiting',
  'ACTIVE': 'active',
}


def create_commands(job: Job, files: str) -> list[list[str]]:
  """Return the commands that create the job. `files` is the folder that contains start.sh."""
  nodes = (
    [f'--node-id={node_names(job)[0]}']
    if job.slices == 1
    else [f'--node-count={job.slices}', f'--node-prefix={job.name}']
  )
  flags = [
    f'--accelerator-type={job.tpu}',
    f'--runtime-version={job.accelerator.kind.image}',
    *nodes,
  ]
  flags += ['--spot'] if job.spot else []
  return [
    [
      *QUEUED_RESOURCES_COMMAND,
      'create',
      job.name,
      *job.location_flags,
      *flags,
      f'--metadata-from-file=startup-script={files}/start.sh',
    ]
  ]


def describe_command(job: Job) -> list[str]:
  """Return the command whose output `parse_state` parses."""
  return [*QUEUED_RESOURCES_COMMAND, 'describe', job.name, *job.location_flags, '--format=json']


def parse_state(text: str) -> JobState:
  """Parse the state, with the name that the cloud gives it and the reason of a failure."""
  state = json.loads(text).get('state', {})
  word = state.get('state', 'UNKNOWN')
  reason = state.get('failedData', {}).get('error', {}).get('message', '')
  return JobState(QUEUED_STATES.get(word, 'lost'), word, reason)


def delete_commands(job: Job) -> list[list[str]]:
  """Return the commands that delete the job and its machines."""
  return [
    [*QUEUED_RESOURCES_COMMAND, 'delete', job.name, *job.location_flags, '--force', '--quiet']
  ]
