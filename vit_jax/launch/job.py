"""A job: one command on every host of one or several slices.

It holds all that the later commands need to know.
"""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

from vit_jax.errors import UserError, did_you_mean
from vit_jax.runtime.files import user_cache_dir, write_atomically
from vit_jax.tpu.accelerators import Accelerator, parse_accelerator

JOB_NAME = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')  # Accepted by gcloud, xpk and Kubernetes.
# A zone, cluster or project, also DOMAIN:PROJECT. xpk puts them into commands of a shell.
CLOUD_NAME = re.compile(r'[a-z0-9][-a-z0-9.:]*')
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
  env: dict[str, str]  # Environment of the command; see environment.py for what is secret.
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
  for flag, value in (('project', job.project), ('zone', job.zone), ('cluster', job.cluster)):
    if value and not CLOUD_NAME.fullmatch(value):
      raise UserError(
        f'--{flag}={value}: expected lower-case letters, digits and dashes, beginning with a '
        'letter or digit'
      )
  for flag, url in (('workdir', job.workdir), ('data', job.data)):
    if url:
      check_bucket_url(flag, url, backend=job.backend)
  if not split_bucket_url(job.workdir)[1]:
    raise UserError(
      f'--workdir={job.workdir}: expected gs://BUCKET/PATH, a folder for this run alone'
    )


def check_bucket_url(flag: str, url: str, *, backend: str):
  """Raise UserError unless a URL is gs://BUCKET[/PATH] whose characters mean themselves.

  gcloud reads `*`, `?`, `[`, `{` and `#` as patterns and generations of objects. On GKE a path is
  one of the mount options, which are separated by commas, with `=` and `:` inside.
  """
  if not re.fullmatch(r'gs://[a-z0-9][-a-z0-9_.]*(/.+)?', url, flags=re.DOTALL):
    raise UserError(f'--{flag}={url}: expected gs://BUCKET/PATH, which every host can reach')
  path = split_bucket_url(url)[1]
  marks = '- _ . + @ ~' if backend == 'gke' else '- _ . + @ ~ = , :'
  if path and not re.fullmatch(rf'[\w/{re.escape(marks.replace(" ", ""))}]+', path):
    raise UserError(
      f'--{flag}={url}: the path may have letters, digits and {marks} with --backend={backend}'
    )
  if path and {'', '.', '..'} & set(path.split('/')):
    raise UserError(f'--{flag}={url}: a folder of the path is empty, . or ..')


def save_job(job: Job):
  """Save a job on this machine, so that status, logs, stop and delete need only its name.

  The file has the values of `--env`, so that only this user can read it.
  """
  user_cache_dir('jobs').mkdir(parents=True, exist_ok=True)
  content = json.dumps(dataclasses.asdict(job), indent=2) + '\n'
  write_atomically(saved_job_path(job.name), content, private=True)


def load_job(name: str) -> Job:
  """Load a saved job. Raises UserError with the known names if there is none of that name."""
  path = saved_job_path(name)
  if not JOB_NAME.fullmatch(name) or not path.is_file():
    known = sorted(each.stem for each in user_cache_dir('jobs').glob('*.json'))
    raise UserError(
      f'{name}: no job of that name was launched from this machine.'
      + (did_you_mean(name, known) if known else '')
    )
  with contextlib.suppress(OSError):
    path.chmod(0o600)  # Others could read the files of earlier versions.
  values = json.loads(path.read_text(encoding='utf-8'))
  return Job(**values | {'command': tuple(values['command'])})


def saved_job_path(name: str) -> Path:
  """Return the path of the saved description of a job."""
  return user_cache_dir('jobs') / f'{name}.json'


def delete_saved_job(job: Job):
  """Delete the saved description of a job."""
  saved_job_path(job.name).unlink(missing_ok=True)
