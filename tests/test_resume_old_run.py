"""Resuming a run directory that has the old names of settings (`checkpoint/renamed_settings.py`).

golden_run/ was written by the commit before the renaming, on one CPU device, up to step 20. It has
the checkpoint of step 10, and in ids.jsonl the examples and the loss of all 20 steps.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.checkpoint.io import read_checkpoint_as_numpy
from vit_jax.checkpoint.run_directory import read_run_config
from vit_jax.settings.fields import config_to_dict
from vit_jax.train import train

GOLDEN_RUN = Path(__file__).parent / 'golden_run'


def read_steps(workdir: Path) -> dict[int, dict]:
  """Return {step: record} of ids.jsonl."""
  records = map(json.loads, (workdir / 'ids.jsonl').read_text(encoding='utf-8').splitlines())
  return {record['step']: record for record in records}


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory) -> tuple[Path, Path]:
  """Return two resumed runs: one with the old names in config.json, one with the new names."""
  old, new = (tmp_path_factory.mktemp('resumed') / name for name in ('old', 'new'))
  for workdir in (old, new):
    shutil.copytree(GOLDEN_RUN, workdir)
  config = read_run_config(new)
  (new / 'config.json').write_text(json.dumps(config_to_dict(config)), encoding='utf-8')
  for workdir in (old, new):
    train(config, workdir)
  return old, new


def test_old_names_have_the_values_that_the_run_was_started_with():
  config = read_run_config(GOLDEN_RUN)
  assert 'drop_at' in (GOLDEN_RUN / 'config.json').read_text(encoding='utf-8')
  assert (config.optim.lr_boundaries, config.optim.lr_boundary_factor) == ('8,16', 0.5)
  assert (config.optim.grad_clip_norm, config.optim.grad_accum_steps) == (1.0, 2)
  assert (config.optim.freeze, config.max_to_keep) == ('.*pos_embedding', 3)
  assert (config.data.randaug_ops, config.data.randaug_magnitude) == (1, 5.0)
  assert (config.probes, config.probe_every) == (('fewshot:builtin:digits',), '10')


def test_the_resumed_run_takes_the_recorded_steps(workdirs):
  got, expected = read_steps(workdirs[0]), read_steps(GOLDEN_RUN)
  assert [*got] == [*expected] == [*range(1, 21)]
  assert [record['ids'] for record in got.values()] == [each['ids'] for each in expected.values()]
  losses = [
    [float.fromhex(record['loss']) for record in records.values()] for records in (got, expected)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_last_state_does_not_depend_on_the_names_in_config_json(workdirs):
  states = [read_checkpoint_as_numpy(workdir / 'checkpoints' / '20') for workdir in workdirs]
  first, second = map(jax.tree.leaves_with_path, states)
  assert len(first) == len(second) > 20
  for (path, a), (other_path, b) in zip(first, second, strict=True):
    assert path == other_path and np.array_equal(a, b), path
