"""What is launched: one command on every host of some slices. Everything that is done to a job is told by this alone."""

import dataclasses
import json
import re

from vit_jax.errors import UserError, did_you_mean
from vit_jax.runtime.files import user_cache_dir
from vit_jax.tpu.accelerators import Accelerator, accelerator

NAME = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')  # What gcloud, xpk and Kubernetes all take.
WORKDIR, DATA = '/mnt/workdir', '/mnt/data'  # Where the buckets are on every host.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
  """One launch. Empty texts are things that were not said."""

  name: str
  backend: str
  tpu: str  # As it is sold: 'v5litepod-256'.
  slices: int
  spot: bool
  project: str
  zone: str
  cluster: str  # Of GKE.
  workdir: str  # gs://BUCKET/PATH
  data: str  # gs://BUCKET[/PATH]
  env: dict[str, str]  # Of the command, LIBTPU_INIT_ARGS with it.
  command: tuple[str, ...]  # What Python is to run: ('run_pretrain.py', '--config=…').
  commit: str
  python: str  # '3.11'

  @property
  def accelerator(self) -> Accelerator:
    """What `tpu` and `slices` name."""
    return accelerator(self.tpu, self.slices)

  @property
  def launch_dir(self) -> str:
    """Where in the bucket everything lies that launching needs."""
    return f'{self.workdir}/launch/{self.name}'

  @property
  def where(self) -> list[str]:
    """The flags that gcloud and xpk want with everything."""
    return (
      [f'--project={self.project}', f'--zone={self.zone}']
      if self.project
      else [f'--zone={self.zone}']
    )


def bucket(url: str) -> tuple[str, str]:
  """'gs://b/c/d' -> ('b', 'c/d')."""
  name, _, path = url.removeprefix('gs://').partition('/')
  return name, path.strip('/')


def refuse_names(job: Job):
  """UserError where a name is none that the cloud takes, or something that the backend needs is missing."""
  if not NAME.fullmatch(job.name) or len(job.name) > 40:
    raise UserError(
      f'--name={job.name}: expected at most 40 small letters, digits and dashes, a letter first'
    )
  needed = {'workdir': job.workdir, 'zone': job.zone} | (
    {'cluster': job.cluster} if job.backend == 'gke' else {}
  )
  if missing := [f'--{name}' for name, value in needed.items() if not value]:
    raise UserError(f'--backend={job.backend} needs {" and ".join(missing)}')
  for flag, url in (('workdir', job.workdir), ('data', job.data)):
    if url and not re.fullmatch(r'gs://[a-z0-9][-a-z0-9_.]*(/[^\s]+)?', url):
      raise UserError(f'--{flag}={url}: expected gs://BUCKET/PATH, which every host can reach')
  if not bucket(job.workdir)[1]:
    raise UserError(
      f'--workdir={job.workdir}: expected gs://BUCKET/PATH: the run has a folder of its own'
    )


def remember(job: Job):
  """So that status, logs, stop and delete need the name alone."""
  user_cache_dir('jobs').mkdir(parents=True, exist_ok=True)
  (user_cache_dir('jobs') / f'{job.name}.json').write_text(
    json.dumps(dataclasses.asdict(job), indent=2) + '\n'
  )


def recall(name: str) -> Job:
  """UserError with the names that there are."""
  path = user_cache_dir('jobs') / f'{name}.json'
  if not NAME.fullmatch(name) or not path.is_file():
    known = sorted(each.stem for each in user_cache_dir('jobs').glob('*.json'))
    raise UserError(
      f'{name}: nothing of that name was launched from here.'
      + (did_you_mean(name, known) if known else '')
    )
  values = json.loads(path.read_text())
  return Job(**values | {'command': tuple(values['command'])})


def forget(job: Job):
  """When it is deleted."""
  (user_cache_dir('jobs') / f'{job.name}.json').unlink(missing_ok=True)
