"""A long run does not leak memory, files, threads, shared memory, arrays or programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# 1,500 steps take 8 minutes on two idle cores.
STEPS = int(os.environ.get('LEAKS_STEPS', '1500'))
SLOPE_SAVES = 500  # Number of saves over which the slope is computed.


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_nothing_grows_over_the_last_500_saves(tmp_path):
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  command = [
    sys.executable,
    str(Path(__file__).with_name('leaks.py')),
    str(tmp_path / 'run'),
    str(STEPS),
  ]
  subprocess.run(command, env=env, cwd=ROOT, check=True)
  found = summarize_growth(tmp_path / 'run')
  print(json.dumps(found, indent=2))
  assert found['saves'] >= SLOPE_SAVES - 10  # Steps shorter than a second may have no line.
  assert found['MB a save'] <= 0.1
  for name in ('fds', 'threads', 'shm', 'arrays'):
    assert found[name]['floor'][1] <= found[name]['floor'][0] + 1, (name, found[name])
  assert found['compiled meanwhile'] == 0


def summarize_growth(workdir: Path) -> dict:
  """Return statistics of the last `SLOPE_SAVES` saves.

  These are the slope of the memory, and for each count its minimum, its maximum and its 'floor':
  the minimum over as many saves before, and over these. Counts rise and fall with every save and
  evaluation, and so does their slope. A leak raises the floor.
  """
  lines = [
    json.loads(line)
    for line in (workdir / 'resources.jsonl').read_text(encoding='utf-8').splitlines()
  ]
  end = max(line['saved'] for line in lines)
  before = [line for line in lines if end - 2 * SLOPE_SAVES <= line['saved'] < end - SLOPE_SAVES]
  # After the last step, the run draws curves.
  lines = [line for line in lines if end - SLOPE_SAVES <= line['saved'] < end]
  saved = np.array([line['saved'] for line in lines])
  slope = lambda name: float(np.polyfit(saved, [line[name] for line in lines], 1)[0])
  counts = {
    name: {
      'least': min(line[name] for line in lines),
      'most': max(line[name] for line in lines),
      'floor': [min(line[name] for line in part) for part in (before, lines)],
    }
    for name in ('fds', 'threads', 'shm', 'shm_files', 'children', 'arrays')
  }
  return {
    'saves': int(saved[-1] - saved[0]) + 1,
    'minutes': round((lines[-1]['time'] - lines[0]['time']) / 60, 1),
    'MB at the end': round(lines[-1]['rss'], 1),
    'MB a save': round(slope('rss'), 4),
    'compiled meanwhile': lines[-1]['compiled'] - lines[0]['compiled'],
  } | counts


if __name__ == '__main__':
  print(json.dumps(summarize_growth(Path(sys.argv[1])), indent=2))
