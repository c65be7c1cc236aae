"""The installed wheel trains, fine-tunes and lists the tables, outside a checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT

ROOT = Path(__file__).parents[1]
SMALL = ('--config.data.eval_split=test[:33]', '--config.data.batch=16')


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
  """Return a directory into which the wheel of this checkout is installed without dependencies."""
  if not importlib.util.find_spec('setuptools'):
    pytest.skip('building without network access needs setuptools')
  root = tmp_path_factory.mktemp('wheel')
  source, site = root / 'source', root / 'site'
  source.mkdir()
  for name in ('vit_jax', 'configs'):  # Building in the checkout would leave files there.
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  wheel = ['wheel', '--no-deps', '--no-build-isolation', f'--wheel-dir={root}', str(source)]
  subprocess.run([*pip, *wheel], check=True)
  (wheel,) = root.glob('*.whl')
  subprocess.run([*pip, 'install', '--no-deps', f'--target={site}', str(wheel)], check=True)
  return site


@pytest.mark.full
def test_wheel_trains_fine_tunes_and_lists_tables_outside_a_checkout(site, tmp_path):
  env = os.environ | ENVIRONMENT
  env['PYTHONPATH'] = os.pathsep.join([str(site), env['PYTHONPATH']])

  def run(*command: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *command]
    done = subprocess.run(
      command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done

  where = run('-c', 'import vit_jax; print(vit_jax.__file__)').stdout
  assert where.startswith(str(site))
  pretrain = ('--workdir=runs/quickstart-1', '--config.steps=20', '--config.data.split=train[:320]')
  done = run('-m', 'vit_jax', 'train', *pretrain, *SMALL, '--config.optim.grad_accum_steps=1')
  assert 'step 20/20' in done.stderr
  # The wheel has the template of the page.
  assert (tmp_path / 'runs' / 'quickstart-1' / 'report.html').is_file()
  finetune = ('--config=quickstart_finetune', '--workdir=tuned', '--config.steps=5')
  done = run('-m', 'vit_jax', 'train', *finetune, *SMALL)
  assert 'runs/quickstart-1' in done.stderr and 'step 5/5' in done.stderr
  done = run('-m', 'vit_jax', 'tables', '--list')
  assert 'Table 5' in done.stdout and 'configs/finetune.py:VARIANT,DATA' in done.stdout
  done = run('-m', 'vit_jax', 'tables', '8', '--dry_run')
  assert '-m vit_jax train --config=configs/pretrain.py:B/16,jft' in done.stdout


def test_every_folder_of_the_package_is_in_the_wheel():
  config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool'][
    'setuptools'
  ]
  folders = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob('vit_jax/**/*.py')}
  packages = {folder.replace('/', '.') for folder in folders}
  assert set(config['packages']) == packages | {'vit_jax.configs'}
