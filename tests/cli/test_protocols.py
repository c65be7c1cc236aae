"""evaluate --protocol: the table, the JSON, and user errors."""

import json
import re

import pytest

from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig

MODEL = ('evaluate', '--init', 'model.npz')


@pytest.fixture(autouse=True)
def model(tmp_path):
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4', depth=1), classes=0, size=(8, 8))


def test_several_probes_run_on_the_same_features(command, tmp_path):
  options = (
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
    *MODEL, *options, '--train_split', 'train[:200]', '--batch', '100', '--json', 'out.json'
  )
  assert code == 0
  assert err.count('\n') == 1 and 'does not state an image size' in err
  head, columns, *rows = out.splitlines()
  assert head == 'model.npz'
  assert columns.split() == ['protocol', 'on', 'accuracy', 'std', 'examples']
  found = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))
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
    assert figure['accuracy'] > 0.15  # Ten classes; random features.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ((), '--data is missing'),
    (('--protocol', 'fewshot'), '--data is missing'),
    (
      ('--protocol', 'knn', '--data', 'builtin:digits', '--shots', '5'),
      '--shots needs --protocol fewshot',
    ),
    (
      ('--protocol', 'fewshot', 'classify', '--data', 'builtin:digits'),
      'classify cannot be combined',
    ),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--per_class', '-'),
      '--per_class needs --protocol classify',
    ),
    (
      ('--protocol', 'real', '--train_split', 'train'),
      '--train_split needs --protocol',
    ),
    (('--data', 'builtin:digits', '--steps', '3'), '--steps needs --protocol vtab'),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--l2', '0'),
      "'0'",
    ),
    (
      ('--protocol', 'fewshot', '--data', 'builtin:digits', '--shots', '500'),
      "500 shots: the class '",
    ),
    (('--protocol', 'real', '--data', 'builtin:digits'), 'has no head'),
    (('--protocol', 'vtab', '--tasks', 'dtds'), "Did you mean 'dtd'"),
    (
      ('--protocol', 'vtab', '--tasks', 'dtd', 'dmlab', '--dir', 'none'),
      '2 of 2 tasks have no data here (dtd, dmlab)',
    ),
  ],
)
def test_flags_of_another_protocol_are_a_user_error_in_one_line(command, options, message):
  code, out, err = command(*MODEL, *options)
  assert (code, out) == (2, '')
  assert message in err.splitlines()[-1]
