"""The damage table: after any damage to a checkpoint, a run resumes from an exact saved state."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('mib', [0.1, 4])
def test_all_damage_is_detected_and_costs_at_most_one_save(tmp_path, mib, capsys):
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
  }
  command, began = (
    [sys.executable, 'tests/soak/damage.py', str(tmp_path), str(mib)],
    time.monotonic(),
  )
  done = subprocess.run(
    command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
  )
  found = json.loads(done.stdout)
  with capsys.disabled():
    counts = {outcome: len(names) for outcome, names in found.items()}
    print(f'\n{mib} MiB: {sum(counts.values())} cases, {counts}, {time.monotonic() - began:.0f} s')
  assert sum(counts.values()) >= 400
  assert found.keys() == {'step 2, exact', 'step 3, exact'}, {
    key: names[:20] for key, names in found.items() if 'exact' not in key
  }
