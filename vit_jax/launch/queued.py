"""Any number of slices as a queued resource: it waits until there are machines, and is suspended when they are taken away."""

import json

from vit_jax.launch.job import Job
from vit_jax.launch.states import State
from vit_jax.launch.tpu_vm import logs, nodes_of, stop

__all__ = ['create', 'delete', 'describe', 'logs', 'read', 'stop']

GCLOUD = ['gcloud', 'compute', 'tpus', 'queued-resources']
# cloud.google.com/tpu/docs/queued-resources; ACCEPTED is what WAITING_FOR_RESOURCES was called.
STATES = {
  'CREATING': 'waiting', 'ACCEPTED': 'waiting', 'WAITING_FOR_RESOURCES': 'waiting', 'PROVISIONING': 'waiting',
  'ACTIVE': 'active',
}  # fmt: skip


def create(job: Job, files: str) -> list[list[str]]:
  """The commands that start it; `files` is the folder with start.sh."""
  nodes = (
    [f'--node-id={nodes_of(job)[0]}']
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
      *GCLOUD,
      'create',
      job.name,
      *job.where,
      *flags,
      f'--metadata-from-file=startup-script={files}/start.sh',
    ]
  ]


def describe(job: Job) -> list[str]:
  """The command whose output `read` reads."""
  return [*GCLOUD, 'describe', job.name, *job.where, '--format=json']


def read(text: str) -> State:
  """The state, the cloud's word for it, and why it failed."""
  found = json.loads(text).get('state', {})
  word = found.get('state', 'UNKNOWN')
  why = found.get('failedData', {}).get('error', {}).get('message', '')
  return State(STATES.get(word, 'lost'), word, why)


def delete(job: Job) -> list[list[str]]:
  """The commands that remove all of it, its machines as well."""
  return [[*GCLOUD, 'delete', job.name, *job.where, '--force', '--quiet']]
