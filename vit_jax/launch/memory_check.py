"""What is refused before anything is created: a run that was not seen to fit."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from vit_jax.config import Config, config_to_dict
from vit_jax.errors import UserError, check_installed
from vit_jax.launch.doctor import versions
from vit_jax.launch.job import DATA
from vit_jax.runtime.files import user_cache_dir
from vit_jax.tpu.accelerators import Accelerator

CODE = Path(__file__).parents[1]


def refuse_unfit(config: Config, settings: list[str], slices: Accelerator, *, libtpu_args: str):
  """UserError where the run does not fit the slices, or nobody can tell. What `plan` once found is remembered."""
  path = user_cache_dir('plans') / f'{digest(config, slices, libtpu_args)}.json'
  if not path.is_file():
    compile_for(settings, slices, path, libtpu_args=libtpu_args)
  found = json.loads(path.read_text())
  if not found['fits']:
    text = f'it needs {found["hbm"] / 2**30:.1f} GiB of a chip of {slices.topology.name}'
    raise UserError(
      f'{text}, and does not fit: config.model.remat, config.optim.grad_accum_steps, config.mesh.fsdp or chips help'
    )
  seconds = found['seconds_per_step']
  time = (
    f'; about {1000 * seconds:.0f} ms a step, {seconds * found["steps"] / 3600:.1f} hours in all'
    if seconds
    else ''
  )
  print(
    f'plan: it fits {slices.topology.name}, {found["hbm"] / 2**30:.1f} GiB of a chip{time}',
    file=sys.stderr,
  )


def compile_for(settings: list[str], slices: Accelerator, path: Path, *, libtpu_args: str):
  """Has `plan` write what it finds to `path`. In a process of its own: libtpu reads its flags once."""
  check_installed('checking that the run fits (--no_plan skips it)', 'plan', 'libtpu')
  path.parent.mkdir(parents=True, exist_ok=True)
  where = [f'--topology={slices.topology.name}', f'--slices={slices.topology.slices}']
  here = [
    setting.replace(f'{DATA}/', '') for setting in settings
  ]  # What is known of the data goes by its own name.
  command = [sys.executable, '-m', 'vit_jax', 'plan', *where, f'--json={path}', *here]
  done = subprocess.run(
    command, env=os.environ | {'LIBTPU_INIT_ARGS': libtpu_args}, stdout=sys.stderr, check=False
  )
  if not path.is_file():
    raise UserError(
      f'plan ended with exit code {done.returncode}, and found nothing; --no_plan launches without it'
    )


def digest(config: Config, slices: Accelerator, libtpu_args: str) -> str:
  """A name for what a verdict is about: the run, the slices, and the code and the compiler that it was found with."""
  text = json.dumps(
    [config_to_dict(config), dataclasses.asdict(slices.topology), libtpu_args, versions()],
    sort_keys=True,
  )
  total = hashlib.sha256(text.encode())
  for path in sorted(CODE.rglob('*.py')):
    total.update(path.read_bytes())
  return total.hexdigest()[:24]
