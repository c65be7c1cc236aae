"""The command `models`."""

import csv
import json
from pathlib import Path

import pytest

RELEASED = Path(__file__).parents[2] / 'vit_jax' / 'pretrained' / 'released.csv'


@pytest.fixture
def run(typed):
  return lambda *args: typed('models', *args)


def released() -> list[dict[str, str]]:
  with RELEASED.open(newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def test_every_released_checkpoint_is_listed_with_its_facts(run):
  code, out, err = run('--json', '-')
  assert (code, err) == (0, '')
  listed = json.loads(out)
  assert [each['name'] for each in listed] == [row['name'] for row in released()]
  for each, row in zip(listed, released(), strict=True):
    assert (each['size'], each['pixels']) == (row['size'], int(row['pixels']))
    assert each['accuracy'] == (float(row['accuracy']) if row['accuracy'] else None)


def test_all_words_of_the_filter_must_match(run):
  _, out, _ = run('SAM b_16')
  names = [line.split()[0] for line in out.splitlines()[1:-2]]
  expected = [row['name'] for row in released() if 'sam' in row['name'] and 'B_16' in row['name']]
  assert names == expected == ['sam/ViT-B_16']


def test_a_filter_without_a_match_is_an_error(run):
  code, out, err = run('nothing')
  assert (code, out) == (2, '')
  assert "'nothing'" in err
