"""evaluate --protocol: the table, the JSON, and what is refused."""

import json
import re

import pytest

from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig

MODEL = ('evaluate', '--init', 'model.npz')


@pytest.fixture(autouse=True)
def model(tmp_path):
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4', depth=1), classes=0, size=(8, 8))


def test_frozen_features_are_judged_in_one_go(command, tmp_path):
  asked = (
    '--protocol',
    'fewshot',
    'knn',
    'linear',
    '--data',
    'builtin:digits',
    '--shots',
    '1',
    '5',
    '--k',
    '3',
  )
  code, out, err = command(
    *MODEL, *asked, '--train_split', 'train[:200]', '--batch', '100', '--json', 'out.json'
  )
  assert (code, err) == (0, '')
  head, columns, *rows = out.splitlines()
  assert head == 'model.npz'
  assert columns.split() == ['protocol', 'on', 'accuracy', 'std', 'examples']
  found = json.loads((tmp_path / 'out.json').read_text())
  shares = {
    f'{each["protocol"]} {name}': (each, figure)
    for each in found['results']
    for name, figure in each['figures'].items()
  }
  assert list(shares) == ['fewshot 1shot', 'fewshot 5shot', 'knn 3nn', 'linear linear']
  for row, (name, (each, figure)) in zip(rows, shares.items(), strict=True):
    std = '' if figure['std'] is None else f' +{figure["std"]:.2%}'
    assert re.fullmatch(rf'{name} +builtin:digits +{figure["accuracy"]:.2%}{std} +500', row)
    assert (each['pool'], each['examples']) == (200, 500)
    assert figure['accuracy'] > 0.15  # Of ten classes, by random features.


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    ((), '--data is missing'),
    (('--protocol', 'fewshot'), '--data is missing'),
    (
      ('--protocol', 'knn', '--data', 'builtin:digits', '--shots', '5'),
      '--shots goes with --protocol fewshot',
    ),
    (('--protocol', 'fewshot', 'classify', '--data', 'builtin:digits'), 'classify goes alone'),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--per_class', '-'),
      '--per_class goes with --protocol classify',
    ),
    (
      ('--protocol', 'real', '--train_split', 'train'),
      '--train_split goes with --protocol fewshot, knn, linear',
    ),
    (('--data', 'builtin:digits', '--steps', '3'), '--steps goes with --protocol vtab'),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--l2', '0'),
      "'0' is no number above 0",
    ),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--shots', '500'),
      "500 shots: the class '",
    ),
    (('--protocol', 'real', '--data', 'builtin:digits'), 'has no head'),
    (('--protocol', 'vtab', '--tasks', 'dtds'), "VTAB has no such task. Did you mean 'dtd'"),
    (
      ('--protocol', 'vtab', '--tasks', 'dtd', 'dmlab', '--dir', 'none'),
      '2 of 2 tasks have no data here (dtd, dmlab)',
    ),
  ],
)
def test_what_does_not_go_together_is_refused_in_one_line(command, asked, message):
  code, out, err = command(*MODEL, *asked)
  assert (code, out) == (2, '')
  assert message in err.splitlines()[-1]
