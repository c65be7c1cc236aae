"""A JobSet on a GKE cluster that xpk made, with --enable-workload-identity and --enable-gcsfuse-csi-driver."""

import json

from vit_jax.errors import RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch.job import DATA, WORKDIR, Job, bucket
from vit_jax.launch.states import State

# What script.py says to gcsfuse, in the words of its CSI driver.
WORKDIR_OPTIONS = ('rename-dir-limit=200000', 'metadata-cache:ttl-secs:0')
CACHES = ('stat-cache-max-size-mb', 'type-cache-max-size-mb', 'ttl-secs')
DATA_OPTIONS = tuple(f'metadata-cache:{cache}:-1' for cache in CACHES)
RESTARTS = 1000  # Spot machines go and come; a run that fails by itself is not started again.


def create(job: Job, files: str) -> list[list[str]]:
  """The commands that start it; `files` is the folder with the code, pins.txt and start.sh, which become its image."""
  attached = [attach(job, *volume) for volume in volumes(job)]
  create = [
    'xpk',
    'workload',
    'create',
    f'--workload={job.name}',
    f'--cluster={job.cluster}',
    *job.where,
  ]
  flags = [f'--tpu-type={job.tpu}', f'--num-slices={job.slices}', *(['--spot'] if job.spot else [])]
  flags += [
    f'--base-docker-image=python:{job.python}',
    f'--script-dir={files}',
    '--command=bash start.sh',
  ]
  flags += [f'--storage={name}' for name, *_ in volumes(job)]
  codes = ','.join(map(str, RESTARTABLE_EXIT_CODES))
  return [
    *attached,
    [*create, *flags, f'--max-restarts={RESTARTS}', f'--restart-on-exit-codes={codes}'],
  ]


def volumes(job: Job) -> list[tuple[str, str, str, tuple[str, ...], bool]]:
  """(name, URL, where it is mounted, options, whether it is read only) of the buckets."""
  found = [(f'{job.name}-workdir', job.workdir, WORKDIR, WORKDIR_OPTIONS, False)]
  return found + ([(f'{job.name}-data', job.data, DATA, DATA_OPTIONS, True)] if job.data else [])


def attach(
  job: Job, name: str, url: str, place: str, options: tuple[str, ...], readonly: bool
) -> list[str]:
  """The command that makes a bucket a volume of the cluster."""
  folder, path = bucket(url)
  mounting = ['implicit-dirs', *([f'only-dir={path}'] if path else []), *options]
  flags = [f'--bucket={folder}', '--size=1', f'--mount-point={place}']
  flags += [f'--readonly={str(readonly).lower()}', '--auto-mount=false']
  command = [
    'xpk',
    'storage',
    'attach',
    name,
    f'--cluster={job.cluster}',
    *job.where,
    '--type=gcsfuse',
    *flags,
  ]
  return [*command, f'--mount-options={",".join(mounting)}']


def describe(job: Job) -> list[str]:
  """The command whose output `read` reads."""
  return ['kubectl', 'get', 'jobset', job.name, '--output=json']


def read(text: str) -> State:
  """The state, Kubernetes' word for it, and why it failed."""
  status = json.loads(text).get('status', {})
  true = {
    each['type']: each.get('message', '')
    for each in status.get('conditions', [])
    if each.get('status') == 'True'
  }
  restarts = f', restarted {status["restarts"]} times' if status.get('restarts') else ''
  if 'Completed' in true:
    return State('done', f'Completed{restarts}')
  if 'Failed' in true:
    return State('failed', f'Failed{restarts}', true['Failed'])
  if any(each.get('ready') for each in status.get('replicatedJobsStatus', [])):
    return State('active', f'Running{restarts}')
  return State('waiting', f'Pending{restarts}')


def delete(job: Job) -> list[list[str]]:
  """The commands that remove all of it."""
  where = [f'--cluster={job.cluster}', *job.where]
  detach = [['xpk', 'storage', 'detach', name, *where] for name, *_ in volumes(job)]
  return [['xpk', 'workload', 'delete', f'--workload={job.name}', *where, '--force'], *detach]


def logs(job: Job, seen: dict[str, int]) -> dict[str, list[str]]:
  """{prefix: the command that follows the pods' logs}: kubectl names the pod in every line."""
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


def stop(job: Job) -> list[list[str]]:
  """UserError: there is nothing between running and gone."""
  raise UserError(
    f'{job.name} has no machines of its own to keep: `launch delete {job.name}` ends it, its workdir stays'
  )
