"""The damage table: each kind of damage to each file of a checkpoint ends with the exact state of a step that was saved."""

import collections
import gc
import random
import time

import pytest

from tests.soak.damage import UNAWAITED, kinds, outcome, save
from tests.soak.saver import like, made


@pytest.mark.slow
@pytest.mark.filterwarnings(UNAWAITED)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('mib', [0.1, 4])
def test_no_damage_goes_unseen_and_none_costs_more_than_a_save(tmp_path, mib, capsys):
  began, found = time.monotonic(), collections.defaultdict(list)
  save(tmp_path / 'whole', mib)
  states, shapes = {step: made(step, mib) for step in (1, 2, 3)}, like(mib)
  for name, damage in kinds(tmp_path / 'whole' / 'checkpoints' / '3', random.Random(0), flips=20):
    found[outcome(tmp_path / 'whole', damage, states, shapes)].append(name)
  gc.collect()  # Here, where what Orbax left unawaited is not warned about.
  with capsys.disabled():
    counts = {outcome: len(names) for outcome, names in found.items()}
    print(f'\n{mib} MiB: {sum(counts.values())} cases, {counts}, {time.monotonic() - began:.0f} s')
  assert sum(counts.values()) >= 400
  assert found.keys() == {'step 2, exact', 'step 3, exact'}, {
    key: names[:20] for key, names in found.items() if 'exact' not in key
  }
