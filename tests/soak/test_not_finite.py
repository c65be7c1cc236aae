"""If a device of one host computes NaN, both hosts skip the step.

The results equal those of one host with as many devices.
"""

import json

import numpy as np
import pytest

from tests.equivalence_worker import CONFIG
from tests.test_equivalence import LAYOUTS, assert_same, start
from vit_jax.metrics.records import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['data', 'both'])
def test_a_non_finite_gradient_on_one_host_skips_the_step_on_both(tmp_path, layout):
  one, two = tmp_path / 'one' / 'run', tmp_path / 'two' / 'run'
  for workdir, processes in ((one, 1), (two, 2)):
    workdir.parent.mkdir()
    start({workdir: LAYOUTS[layout]}, poisoned=True, processes=processes, devices=8 // processes)
  left_out = [
    (record['step'], record['ids']) for record in read_metrics(two) if 'left_out' in record
  ]
  assert 0 < len(left_out) < CONFIG.steps
  assert left_out == [
    (record['step'], record['ids']) for record in read_metrics(one) if 'left_out' in record
  ]
  counted = [record for record in read_metrics(two) if 'loss' in record]
  assert [record['step'] for record in counted if record['not_finite']] == [
    step for step, _ in left_out
  ]
  assert not np.isfinite(
    [float(record['loss']) for record in counted if record['not_finite']]
  ).any()
  assert json.loads((two / 'config.json').read_text(encoding='utf-8'))['steps'] == CONFIG.steps
  assert_same(two, one)
