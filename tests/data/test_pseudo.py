"""Pseudo-labels: the choice against one made by hand, what is written against what is read, and what is refused."""

import json
import pickle

import numpy as np
import pytest

from vit_jax.data import pseudo
from vit_jax.data.pseudo import (
  describe_pseudo_labels,
  read_pseudo_labels,
  select_balanced,
  start_pseudo_labels,
  write_best_labels,
  write_probabilities,
)
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

DIGITS = open_source('builtin:digits', 'train[:100]')
NAMES = DIGITS.label_names


def said(n: int = 100, k: int = 10, seed: int = 0) -> np.ndarray:
  """Probabilities [n, k]."""
  logits = 3 * np.random.default_rng(seed).normal(size=(n, k))
  return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def written(where, probabilities: np.ndarray | None = None, monkeypatch=None, **facts):
  """A directory with these labels of DIGITS, in parts of 30."""
  if monkeypatch:
    monkeypatch.setattr(pseudo, 'PART_EXAMPLES', 30)
  probabilities = said() if probabilities is None else probabilities
  start_pseudo_labels(where, describe_pseudo_labels(DIGITS, NAMES, **facts))
  parts = range(0, len(probabilities), pseudo.PART_EXAMPLES)
  for i, start in enumerate(parts):
    write_probabilities(where, i, probabilities[start : start + pseudo.PART_EXAMPLES])
  write_best_labels(where, len(parts))
  return where


@pytest.mark.parametrize(('least', 'count'), [(0.3, 7), (0.5, 40), (0.0, 1), (0.9, 300)])
def test_each_class_has_as_many_the_surest_or_all_equally_often(least, count):
  p = said(400)
  best, confidence = p.argmax(1).astype(np.int32), p.max(1).astype(np.float32)
  chosen = select_balanced(best, confidence, classes=10, least=least, count=count, seed=3)
  for c in range(10):
    members = [i for i in range(400) if best[i] == c and confidence[i] >= least]
    mine = [i for i in chosen.tolist() if best[i] == c]
    assert len(mine) == (count if members else 0)
    if len(members) >= count:
      assert mine == sorted(members, key=lambda i: (-confidence[i], i))[:count]
    else:
      often = [mine.count(i) for i in members]
      assert sum(often) == len(mine) and (not often or max(often) - min(often) <= 1)
  assert confidence[chosen].min() >= least


def test_the_choice_depends_on_the_seed_and_on_nothing_else():
  best, confidence = np.zeros(50, np.int32), np.linspace(0.5, 1, 50, dtype=np.float32)
  choose = lambda seed: select_balanced(
    best, confidence, classes=3, least=0.3, count=70, seed=seed
  ).tolist()
  assert choose(1) == choose(1) != choose(2)
  assert (
    choose(1)[50:] == choose(1)[50:] and len(set(choose(1)[50:])) == 20
  )  # Those that come twice are different ones.


def test_an_image_that_could_not_be_read_is_never_chosen():
  confidence = np.array([0.0, 0.2], np.float32)
  assert select_balanced(
    np.zeros(2, np.int32), confidence, classes=1, least=0.0, count=3, seed=0
  ).tolist() == [1, 1, 1]


def test_what_is_written_in_parts_is_read_by_number(tmp_path, monkeypatch):
  labels = read_pseudo_labels(written(tmp_path / 'labels', monkeypatch=monkeypatch), DIGITS, NAMES)
  assert sorted(path.name for path in labels.where.glob('*.npy')) == [
    f'0000{i}.npy' for i in range(4)
  ]
  half = said().astype(np.float16)
  np.testing.assert_array_equal(np.stack([labels[i] for i in range(100)]), half.astype(np.float32))
  np.testing.assert_array_equal(labels.best, half.argmax(1))
  np.testing.assert_array_equal(labels.confidence, half.max(1).astype(np.float32))
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels))[99], half[99].astype(np.float32))


def test_other_probabilities_have_another_digest(tmp_path):
  one, other = (
    read_pseudo_labels(written(tmp_path / str(seed), said(seed=seed)), DIGITS, NAMES).digest
    for seed in (0, 1)
  )
  assert one != other


def test_labels_of_other_images_or_classes_are_refused_by_name(tmp_path):
  where = written(tmp_path / 'labels', teacher='0-teacher')
  with pytest.raises(UserError, match=r'examples: 100 there, 99 here.*listing'):
    read_pseudo_labels(where, open_source('builtin:digits', 'train[:99]'), NAMES)
  with pytest.raises(UserError, match="classes: .*'zero'"):
    read_pseudo_labels(where, DIGITS, ('zero', *NAMES[1:]))
  with pytest.raises(UserError, match=r'teacher: 0-teacher there, another here'):
    start_pseudo_labels(where, describe_pseudo_labels(DIGITS, NAMES, teacher='another'))


DAMAGE = {
  'unfinished': (
    lambda where: (where / 'best.npz').unlink(),
    'holds no whole labels; `python -m vit_jax selftrain` makes',
  ),
  'absent': (lambda where: (where / '00000.npy').unlink(), 'damaged .*remove'),
  'cut': (
    lambda where: (where / 'best.npz').write_bytes((where / 'best.npz').read_bytes()[:99]),
    'damaged .*remove',
  ),
  'short': (
    lambda where: write_probabilities(where, 0, said(99)),
    'labels of shapes .* for 100 examples: remove',
  ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_an_error_that_says_what_to_remove(tmp_path, damage):
  where = written(tmp_path / 'labels')
  do, message = DAMAGE[damage]
  do(where)
  with pytest.raises(UserError, match=message):
    read_pseudo_labels(where, DIGITS, NAMES)


def test_the_teacher_is_told_beside_them(tmp_path):
  facts = json.loads((written(tmp_path / 'labels', teacher='runs/b7') / 'teacher.json').read_text())
  assert (
    facts['teacher'] == 'runs/b7' and facts['examples'] == 100 and facts['classes'] == list(NAMES)
  )
