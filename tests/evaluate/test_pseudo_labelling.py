"""Pseudo-labels on eight devices, in parts, against the teacher's logits image by image."""

import shutil

import numpy as np
import pytest

from tests.evaluate.conftest import NAMES
from vit_jax.data import pseudo_labels
from vit_jax.data.pseudo_labels import read_pseudo_labels
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import pseudo_labelling
from vit_jax.evaluate.pseudo_labelling import write_pseudo_labels


@pytest.fixture
def parts(monkeypatch):
  """Reduce parts to ten examples."""
  for module in (pseudo_labels, pseudo_labelling):
    monkeypatch.setattr(module, 'PART_EXAMPLES', 10)


def labelled(model, source, where, classes=NAMES) -> np.ndarray:
  """Return the probabilities [n, k] of every example."""
  write_pseudo_labels(
    model, source, where, classes=classes, facts={'teacher': 'it'}, batch=8, bad_images='skip'
  )
  labels = read_pseudo_labels(where, source, classes)
  return np.stack([labels[i] for i in range(len(source))])


def test_probabilities_are_the_teachers_in_the_order_of_the_students_classes(
  parts, make_model, source, by_hand, tmp_path
):
  model, student = make_model(), ('hen', 'cat', 'dog', 'cow')
  probabilities = labelled(model, source, tmp_path / 'labels', classes=student)
  logits = by_hand(model, source)[1][:, [NAMES.index(name) for name in student]]
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(probabilities, expected, rtol=1e-3)  # Files have half precision.


def test_existing_parts_are_kept_and_missing_ones_are_written(parts, make_model, source, tmp_path):
  model = make_model()
  complete = labelled(model, source, tmp_path / 'labels')
  for name in ('best.npz', '00002.npy'):
    (tmp_path / 'labels' / name).unlink()
  kept = (tmp_path / 'labels' / '00001.npy').stat().st_mtime_ns
  np.testing.assert_array_equal(labelled(model, source, tmp_path / 'labels'), complete)
  assert (tmp_path / 'labels' / '00001.npy').stat().st_mtime_ns == kept


def test_another_teacher_does_not_resume_the_labels(parts, make_model, source, tmp_path):
  labelled(make_model(), source, tmp_path / 'labels')
  with pytest.raises(UserError, match='parameters'):
    labelled(make_model(depth=3), source, tmp_path / 'labels')


def test_an_unreadable_image_has_probabilities_of_zero(make_model, photos, tmp_path):
  root = tmp_path / 'photos'
  shutil.copytree(photos, root)
  (root / 'val' / 'cat' / '00.png').write_bytes(b'no image')
  said = labelled(make_model(), open_source(f'folder:{root}', 'val'), tmp_path / 'labels')
  assert not said[0].any() and (said[1:].max(axis=1) > 0.2).all()


def test_a_teacher_without_a_class_is_a_user_error(make_model, source, tmp_path):
  with pytest.raises(UserError, match="'owl'"):
    write_pseudo_labels(
      make_model(), source, tmp_path / 'labels', classes=('owl', *NAMES[1:]), facts={}, batch=8
    )
