"""Pseudo-labels: the selection, the files and the errors."""

import json
import pickle

import numpy as np
import pytest

from vit_jax.data import pseudo_labels
from vit_jax.data.pseudo_labels import (
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


def random_probabilities(n: int = 100, k: int = 10, seed: int = 0) -> np.ndarray:
  """Return class probabilities [n, k]."""
  logits = 3 * np.random.default_rng(seed).normal(size=(n, k))
  return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def write_labels(directory, probabilities: np.ndarray | None = None, monkeypatch=None, **facts):
  """Write pseudo-labels of DIGITS and return the directory; with monkeypatch, in parts of 30."""
  if monkeypatch:
    monkeypatch.setattr(pseudo_labels, 'PART_EXAMPLES', 30)
  probabilities = random_probabilities() if probabilities is None else probabilities
  start_pseudo_labels(directory, describe_pseudo_labels(DIGITS, NAMES, **facts))
  parts = range(0, len(probabilities), pseudo_labels.PART_EXAMPLES)
  for i, start in enumerate(parts):
    write_probabilities(directory, i, probabilities[start : start + pseudo_labels.PART_EXAMPLES])
  write_best_labels(directory, len(parts))
  return directory


@pytest.mark.parametrize(('threshold', 'count'), [(0.3, 7), (0.5, 40), (0.0, 1), (0.9, 300)])
def test_each_class_has_the_most_confident_images_or_all_equally_counts(threshold, count):
  p = random_probabilities(400)
  best, confidence = p.argmax(1).astype(np.int32), p.max(1).astype(np.float32)
  chosen = select_balanced(best, confidence, classes=10, threshold=threshold, count=count, seed=3)
  for c in range(10):
    candidates = [i for i in range(400) if best[i] == c and confidence[i] >= threshold]
    selected = [i for i in chosen.tolist() if best[i] == c]
    assert len(selected) == (count if candidates else 0)
    if len(candidates) >= count:
      assert selected == sorted(candidates, key=lambda i: (-confidence[i], i))[:count]
    else:
      counts = [selected.count(i) for i in candidates]
      assert sum(counts) == len(selected) and (not counts or max(counts) - min(counts) <= 1)
  assert confidence[chosen].min() >= threshold


def test_the_selection_depends_only_on_the_seed():
  best, confidence = np.zeros(50, np.int32), np.linspace(0.5, 1, 50, dtype=np.float32)
  choose = lambda seed: select_balanced(
    best, confidence, classes=3, threshold=0.3, count=70, seed=seed
  ).tolist()
  assert choose(1) == choose(1) != choose(2)
  assert len(set(choose(1)[50:])) == 20  # No index repeats among the extra ones.


def test_an_unreadable_image_is_never_selected():
  confidence = np.array([0.0, 0.2], np.float32)
  assert select_balanced(
    np.zeros(2, np.int32), confidence, classes=1, threshold=0.0, count=3, seed=0
  ).tolist() == [1, 1, 1]


def test_each_class_repeats_another_random_subset():
  top_class, confidence = np.repeat(np.arange(2, dtype=np.int32), 50), np.ones(100, np.float32)
  selected = select_balanced(top_class, confidence, classes=2, threshold=0.3, count=70, seed=0)
  assert set(selected[50:70]) != set(selected[120:140] - 50)


def test_a_confidence_equal_to_the_threshold_is_selected():
  confidence = np.array([0.3, 0.29, 0.31], np.float32)
  selected = select_balanced(
    np.zeros(3, np.int32), confidence, classes=1, threshold=0.3, count=2, seed=0
  )
  assert selected.tolist() == [2, 0]


def test_probabilities_written_in_parts_are_read_by_index(tmp_path, monkeypatch):
  labels = read_pseudo_labels(
    write_labels(tmp_path / 'labels', monkeypatch=monkeypatch), DIGITS, NAMES
  )
  assert sorted(path.name for path in labels.directory.glob('*.npy')) == [
    f'0000{i}.npy' for i in range(4)
  ]
  half = random_probabilities().astype(np.float16)
  np.testing.assert_array_equal(np.stack([labels[i] for i in range(100)]), half.astype(np.float32))
  np.testing.assert_array_equal(labels.top_class, half.argmax(1))
  np.testing.assert_array_equal(labels.confidence, half.max(1).astype(np.float32))
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels))[99], half[99].astype(np.float32))


def test_other_probabilities_have_another_checksum(tmp_path):
  one, other = (
    read_pseudo_labels(
      write_labels(tmp_path / str(seed), random_probabilities(seed=seed)), DIGITS, NAMES
    ).checksum
    for seed in (0, 1)
  )
  assert one != other


def test_pseudo_labels_of_other_images_or_classes_are_an_error(tmp_path):
  where = write_labels(tmp_path / 'labels', teacher='0-teacher')
  with pytest.raises(UserError, match=r'examples: 100 .*99 .*listing'):
    read_pseudo_labels(where, open_source('builtin:digits', 'train[:99]'), NAMES)
  with pytest.raises(UserError, match="classes: .*'zero'"):
    read_pseudo_labels(where, DIGITS, ('zero', *NAMES[1:]))
  with pytest.raises(UserError, match=r'teacher: 0-teacher .*another'):
    start_pseudo_labels(where, describe_pseudo_labels(DIGITS, NAMES, teacher='another'))


DAMAGE = {
  'unfinished': (
    lambda where: (where / 'best.npz').unlink(),
    'config.data.pseudo_labels=.*selftrain',
  ),
  'absent': (lambda where: (where / '00000.npy').unlink(), 'labels is damaged'),
  'cut': (
    lambda where: (where / 'best.npz').write_bytes((where / 'best.npz').read_bytes()[:99]),
    'labels is damaged',
  ),
  'short': (
    lambda where: write_probabilities(where, 0, random_probabilities(99)),
    'labels is damaged .*99',
  ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_pseudo_labels_are_an_error_that_names_the_directory(tmp_path, damage):
  where = write_labels(tmp_path / 'labels')
  do, message = DAMAGE[damage]
  do(where)
  with pytest.raises(UserError, match=message):
    read_pseudo_labels(where, DIGITS, NAMES)


def test_teacher_json_describes_the_teacher(tmp_path):
  facts = json.loads(
    (write_labels(tmp_path / 'labels', teacher='runs/b7') / 'teacher.json').read_text(
      encoding='utf-8'
    )
  )
  assert (
    facts['teacher'] == 'runs/b7' and facts['examples'] == 100 and facts['classes'] == list(NAMES)
  )
