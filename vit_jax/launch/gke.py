"""Backend `gke`: a JobSet on a GKE cluster.

xpk must have created the cluster with --enable-workload-identity and --enable-gcsfuse-csi-driver.
"""

import json

from vit_jax.errors import RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch.job import DATA, WORKDIR, Job, split_bucket_url
from vit_jax.launch.states import JobState

# The options of script.py in the syntax of gcsfuse's CSI driver.
WORKDIR_OPTIONS = ('rename-dir-limit=200000', 'metadata-cache:ttl-secs:0')
DATA_CACHES = ('stat-cache-max-size-mb', 'type-cache-max-size-mb', 'ttl-secs')
DATA_OPTIONS = tuple(f'metadata-cache:{cache}:-1' for cache in DATA_CACHES)
MAX_RESTARTS = (
  1000  # Spot machines come and go. A run that fails by its own fault is not restarted.
)


def create_commands(job: Job, files: str) -> list[list[str]]:
  """Return the commands that create the job.

  `files` is the folder with the code, pins.txt and start.sh, which become the container image. The
  file `files`.env beside it has the values of `--env`, which do not.
  """
  attached = [attach_command(job, *volume) for volume in bucket_volumes(job)]
  create = [
    'xpk',
    'workload',
    'create',
    f'--workload={job.name}',
    f'--cluster={job.cluster}',
    *job.location_flags,
  ]
  flags = [f'--tpu-type={job.tpu}', f'--num-slices={job.slices}', *(['--spot'] if job.spot else [])]
  flags += [
    f'--base-docker-image=python:{job.python}',
    f'--script-dir={files}',
    '--command=bash start.sh',
    f'--env-file={files}.env',
  ]
  flags += [f'--storage={name}' for name, *_ in bucket_volumes(job)]
  codes = ','.join(map(str, RESTARTABLE_EXIT_CODES))
  return [
    *attached,
    [*create, *flags, f'--max-restarts={MAX_RESTARTS}', f'--restart-on-exit-codes={codes}'],
  ]


def bucket_volumes(job: Job) -> list[tuple[str, str, str, tuple[str, ...], bool]]:
  """Return (name, URL, mount point, mount options, read-only) of each bucket."""
  found = [(f'{job.name}-workdir', job.workdir, WORKDIR, WORKDIR_OPTIONS, False)]
  return found + ([(f'{job.name}-data', job.data, DATA, DATA_OPTIONS, True)] if job.data else [])


def attach_command(
  job: Job, name: str, url: str, place: str, options: tuple[str, ...], readonly: bool
) -> list[str]:
  """Return the command that makes a bucket a volume of the cluster."""
  folder, path = split_bucket_url(url)
  mounting = ['implicit-dirs', *([f'only-dir={path}'] if path else []), *options]
  flags = [f'--bucket={folder}', '--size=1', f'--mount-point={place}']
  flags += [f'--readonly={str(readonly).lower()}', '--auto-mount=false']
  command = [
    'xpk',
    'storage',
    'attach',
    name,
    f'--cluster={job.cluster}',
    *job.location_flags,
    '--type=gcsfuse',
    *flags,
  ]
  return [*command, f'--mount-options={",".join(mounting)}']


def describe_command(job: Job) -> list[str]:
  """Return the command whose output `parse_state` parses."""
  return ['kubectl', 'get', 'jobset', job.name, '--output=json']


def parse_state(text: str) -> JobState:
  """Parse the state, with its name in Kubernetes and the reason of a failure."""
  status = json.loads(text).get('status', {})
  true = {
    each['type']: each.get('message', '')
    for each in status.get('conditions', [])
    if each.get('status') == 'True'
  }
  restarts = f', restarted {status["restarts"]} times' if status.get('restarts') else ''
  if 'Completed' in true:
    return JobState('done', f'Completed{restarts}')
  if 'Failed' in true:
    return JobState('failed', f'Failed{restarts}', true['Failed'])
  if any(each.get('ready') for each in status.get('replicatedJobsStatus', [])):
    return JobState('active', f'Running{restarts}')
  return JobState('waiting', f'Pending{restarts}')


def delete_commands(job: Job) -> list[list[str]]:
  """Return the commands that delete the job and its volumes."""
  where = [f'--cluster={job.cluster}', *job.location_flags]
  detach = [['xpk', 'storage', 'detach', name, *where] for name, *_ in bucket_volumes(job)]
  return [['xpk', 'workload', 'delete', f'--workload={job.name}', *where, '--force'], *detach]


def log_commands(job: Job, seen: dict[str, int]) -> dict[str, list[str]]:
  """Return {prefix: command that follows the pods' logs}. kubectl itself prefixes each line."""
  hosts = job.accelerator.topology.hosts
  since = '--tail=-1' if not seen else '--since=10s'
  selector = f'--selector=jobset.sigs.k8s.io/jobset-name={job.name}'
  return {
    '': [
      'kubectl',
      'logs',
      selector,
      '--follow',
      '--prefix',
      since,
      f'--max-log-requests={hosts}',
      '--ignore-errors',
    ]
  }


def stop_commands(job: Job) -> list[list[str]]:
  """Raise UserError: a JobSet cannot stop and keep its machines."""
  raise UserError(
    f'{job.name} runs on the machines of a cluster: `launch delete {job.name}` ends it and keeps '
    'its workdir'
  )
