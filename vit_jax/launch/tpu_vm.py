"""One slice as a TPU VM, created at once or not at all."""

import json

from vit_jax.launch.job import Job
from vit_jax.launch.script import LOG
from vit_jax.launch.states import State

GCLOUD = ['gcloud', 'compute', 'tpus', 'tpu-vm']
STOP = 'sudo sh -c "touch /run/vit_jax/stop; kill -TERM $(cat /run/vit_jax/pid)"'
# cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State
STATES = {
  'CREATING': 'waiting',
  'STARTING': 'waiting',
  'RESTARTING': 'waiting',
  'REPAIRING': 'waiting',
  'READY': 'active',
}


def create(job: Job, files: str) -> list[list[str]]:
  """The commands that start it; `files` is the folder with start.sh."""
  flags = [
    f'--accelerator-type={job.tpu}',
    f'--version={job.accelerator.kind.image}',
    *(['--spot'] if job.spot else []),
  ]
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
  """The state, and the cloud's word for it."""
  word = json.loads(text).get('state', 'UNKNOWN')
  return State(STATES.get(word, 'lost'), word)


def delete(job: Job) -> list[list[str]]:
  """The commands that remove all of it."""
  return [[*GCLOUD, 'delete', job.name, *job.where, '--quiet']]


def logs(job: Job, seen: dict[str, int]) -> dict[str, list[str]]:
  """{prefix: the command that follows a host's log}, after the lines that were seen of it."""
  hosts = [(node, worker) for node in nodes_of(job) for worker in range(job.accelerator.hosts)]
  follow = lambda host: (
    f'sudo tail --lines=+{seen.get(f"host {host}", 0) + 1} --follow=name --retry {LOG} 2>/dev/null'
  )
  return {
    f'host {i}': [*GCLOUD, 'ssh', node, *job.where, f'--worker={worker}', f'--command={follow(i)}']
    for i, (node, worker) in enumerate(hosts)
  }


def stop(job: Job) -> list[list[str]]:
  """The commands that end the run and leave the machines."""
  return [
    [*GCLOUD, 'ssh', node, *job.where, '--worker=all', f'--command={STOP}']
    for node in nodes_of(job)
  ]


def nodes_of(job: Job) -> list[str]:
  """The names of a job's slices: a queued resource of several numbers them."""
  return [job.name] if job.slices == 1 else [f'{job.name}-{i}' for i in range(job.slices)]
