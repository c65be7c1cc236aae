"""A check before anything is created: `plan` has to find that the run fits."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from vit_jax.config import Config
from vit_jax.errors import UserError, check_installed
from vit_jax.launch.doctor import installed_versions
from vit_jax.launch.job import DATA
from vit_jax.runtime.files import user_cache_dir
from vit_jax.settings.fields import config_to_dict
from vit_jax.tpu.accelerators import Accelerator

PACKAGE_ROOT = Path(__file__).parents[1]


def check_fits(config: Config, settings: list[str], slices: Accelerator, *, libtpu_args: str):
  """Raise UserError if the run does not fit the slices, or if that cannot be found out.

  Results of `plan` are cached.
  """
  path = user_cache_dir('plans') / f'{plan_digest(config, slices, libtpu_args)}.json'
  if not path.is_file():
    run_plan(settings, slices, path, libtpu_args=libtpu_args)
  found = json.loads(path.read_text(encoding='utf-8'))
  if not found['fits']:
    text = f'it needs {found["hbm"] / 2**30:.1f} GiB of a chip of {slices.topology.name}'
    raise UserError(
      f'{text}, and does not fit; use config.model.remat, config.optim.grad_accum_steps, '
      'config.mesh.fsdp or more chips'
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


def run_plan(settings: list[str], slices: Accelerator, path: Path, *, libtpu_args: str):
  """Run `plan`, which writes its result to `path`.

  It needs a separate process: libtpu reads its flags once.
  """
  check_installed('checking that the run fits (--no_plan skips it)', 'plan', 'libtpu')
  path.parent.mkdir(parents=True, exist_ok=True)
  where = [f'--topology={slices.topology.name}', f'--slices={slices.topology.slices}']
  # Here the data is not mounted: it goes by its bare name, whose size may be known.
  local_settings = [setting.replace(f'{DATA}/', '') for setting in settings]
  command = [sys.executable, '-m', 'vit_jax', 'plan', *where, f'--json={path}', *local_settings]
  done = subprocess.run(
    command, env=os.environ | {'LIBTPU_INIT_ARGS': libtpu_args}, stdout=sys.stderr, check=False
  )
  if not path.is_file():
    raise UserError(
      f'plan ended with exit code {done.returncode} and no result; --no_plan launches without it'
    )


def plan_digest(config: Config, slices: Accelerator, libtpu_args: str) -> str:
  """Return a key for the cache of plans: run, slices, code and compiler."""
  text = json.dumps(
    [
      config_to_dict(config),
      dataclasses.asdict(slices.topology),
      libtpu_args,
      installed_versions(),
    ],
    sort_keys=True,
  )
  total = hashlib.sha256(text.encode())
  for path in sorted(PACKAGE_ROOT.rglob('*.py')):
    total.update(path.read_bytes())
  return total.hexdigest()[:24]
