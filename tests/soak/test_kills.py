"""`kill -9` at any time loses no committed checkpoint and corrupts none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_300_kills_lose_no_checkpoint(tmp_path, capsys):
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
  }
  command = [sys.executable, 'tests/soak/saver.py', str(tmp_path), '300', '0', '8']
  found = json.loads(
    subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
  )
  with capsys.disabled():
    print(f'\n{found}')
  assert (found['rounds'], found['lost'], found['wrong']) == (300, 0, 0)
  assert min(found['starting'], found['saving'], found['deleting']) > 0
