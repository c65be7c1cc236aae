"""A job: one command on every host of one or several slices.

It holds all that the later commands need to know.
"""

import dataclasses
import json
import re

from vit_jax.errors import UserError, did_you_mean
from vit_jax.runtime.files import user_cache_dir
from vit_jax.tpu.accelerators import Accelerator, parse_accelerator

JOB_NAME = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')  # Accepted by gcloud, xpk and Kubernetes.
WORKDIR, DATA = '/mnt/workdir', '/mnt/data'  # Mount points of the buckets on every host.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
  """One launch. An empty string means that the option was not given."""

  name: str
  backend: str
  tpu: str  # Accelerator type: 'v5litepod-256'.
  slices: int
  spot: bool
  project: str
  zone: str
  cluster: str  # A GKE cluster.
  workdir: str  # gs://BUCKET/PATH
  data: str  # gs://BUCKET[/PATH]
  env: dict[str, str]  # Environment of the command, including LIBTPU_INIT_ARGS.
  command: tuple[str, ...]  # Arguments of Python: ('run_pretrain.py', '--config=…').
  commit: str
  python: str  # '3.11'

  @property
  def accelerator(self) -> Accelerator:
    """The slices that `tpu` and `slices` name."""
    return parse_accelerator(self.tpu, self.slices)

  @property
  def launch_dir(self) -> str:
    """The folder in the bucket with everything that launching needs."""
    return f'{self.workdir}/launch/{self.name}'

  @property
  def location_flags(self) -> list[str]:
    """Flags for project and zone, which every command of gcloud and xpk takes."""
    return (
      [f'--project={self.project}', f'--zone={self.zone}']
      if self.project
      else [f'--zone={self.zone}']
    )


def split_bucket_url(url: str) -> tuple[str, str]:
  """Split 'gs://b/c/d' into ('b', 'c/d')."""
  name, _, path = url.removeprefix('gs://').partition('/')
  return name, path.strip('/')


def check_job(job: Job):
  """Raise UserError if the cloud does not accept a name, or if the backend lacks an option."""
  if not JOB_NAME.fullmatch(job.name) or len(job.name) > 40:
    raise UserError(
      f'--name={job.name}: expected at most 40 lower-case letters, digits and dashes, beginning '
      'with a letter'
    )
  needed = {'workdir': job.workdir, 'zone': job.zone} | (
    {'cluster': job.cluster} if job.backend == 'gke' else {}
  )
  if missing := [f'--{name}' for name, value in needed.items() if not value]:
    raise UserError(f'--backend={job.backend} needs {" and ".join(missing)}')
  for flag, url in (('workdir', job.workdir), ('data', job.data)):
    if url and not re.fullmatch(r'gs://[a-z0-9][-a-z0-9_.]*(/[^\s]+)?', url):
      raise UserError(f'--{flag}={url}: expected gs://BUCKET/PATH, which every host can reach')
  if not split_bucket_url(job.workdir)[1]:
    raise UserError(
      f'--workdir={job.workdir}: expected gs://BUCKET/PATH, a folder for this run alone'
    )


def save_job(job: Job):
  """Save a job on this machine, so that status, logs, stop and delete need only its name."""
  user_cache_dir('jobs').mkdir(parents=True, exist_ok=True)
  (user_cache_dir('jobs') / f'{job.name}.json').write_text(
    json.dumps(dataclasses.asdict(job), indent=2) + '\n', encoding='utf-8'
  )


def load_job(name: str) -> Job:
  """Load a saved job. Raises UserError with the known names if there is none of that name."""
  path = user_cache_dir('jobs') / f'{name}.json'
  if not JOB_NAME.fullmatch(name) or not path.is_file():
    known = sorted(each.stem for each in user_cache_dir('jobs').glob('*.json'))
    raise UserError(
      f'{name}: no job of that name was launched from this machine.'
      + (did_you_mean(name, known) if known else '')
    )
  values = json.loads(path.read_text(encoding='utf-8'))
  return Job(**values | {'command': tuple(values['command'])})


def delete_saved_job(job: Job):
  """Delete the saved description of a job."""
  (user_cache_dir('jobs') / f'{job.name}.json').unlink(missing_ok=True)
