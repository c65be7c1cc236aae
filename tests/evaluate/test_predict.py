"""Predictions for image files: their order, their probabilities, and files that are not images."""

import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.conftest import NAMES
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import find_image_files, predict_files


@pytest.fixture
def paths(photos):
  return find_image_files([str(photos)])


@pytest.mark.parametrize('batch', [1, 5, 37, 64])
def test_each_image_has_its_own_prediction_with_every_batch_size(make_model, paths, batch):
  model = make_model()
  images = np.stack([np.asarray(Image.open(path)) for path in paths])
  logits = np.asarray(model.logits(images), np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  found = list(predict_files(model, paths, top=3, batch=batch))
  assert [each.path for each in found] == paths
  for each, row in zip(found, expected, strict=True):
    order = np.argsort(-row)[:3]
    assert each.labels == tuple(NAMES[i] for i in order)
    np.testing.assert_allclose(each.probabilities, row[order], atol=1e-5)


def test_probabilities_of_a_sigmoid_model_are_independent(make_model, paths):
  model = dataclasses.replace(make_model(), loss='sigmoid')
  (each,) = model.predict(paths[:1])
  logits = np.sort(np.asarray(model.logits(np.asarray(Image.open(paths[0]))[None]), np.float64)[0])[
    ::-1
  ]
  np.testing.assert_allclose(each.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_photos_are_turned_upright_unless_the_model_ignores_the_orientation(tmp_path, make_model):
  model, exif = make_model(), Image.Exif()
  exif[0x0112] = 6  # A quarter turn.
  h, w = model.size
  stored = np.random.default_rng(0).integers(0, 256, (w, h, 3), np.uint8)
  Image.fromarray(stored).save(tmp_path / 'photo.png', exif=exif)
  upright = np.rot90(stored, -1)

  def best(model) -> float:
    return model.predict([str(tmp_path / 'photo.png')], top=1)[0].probabilities[0]

  def expected(image: np.ndarray) -> float:
    logits = np.asarray(model.logits(np.ascontiguousarray(image)[None]), np.float64)[0]
    return np.exp(logits - logits.max()).sum() ** -1

  assert model.preprocessing.orient == 'auto'
  assert best(model) == pytest.approx(expected(upright), abs=1e-5)
  steps = dataclasses.replace(model.preprocessing, orient='ignore')
  ignoring = dataclasses.replace(model, preprocessing=steps)
  assert best(ignoring) == pytest.approx(expected(stored), abs=1e-5)
  assert abs(expected(upright) - expected(stored)) > 1e-3


def test_classes_without_names_are_numbered(make_model, paths):
  (each,) = make_model(()).predict(paths[:1], top=4)
  assert sorted(each.labels) == ['class 0', 'class 1', 'class 2', 'class 3']


def test_an_unreadable_file_has_an_error_and_the_others_are_predicted(tmp_path, make_model, paths):
  (tmp_path / 'empty.png').touch()
  (tmp_path / 'text.jpg').write_text('hello', encoding='utf-8')
  encoded = io.BytesIO()
  Image.new('RGB', (64, 64), 'red').save(encoded, 'JPEG')
  (tmp_path / 'cut.jpg').write_bytes(encoded.getvalue()[:300])
  bad = [str(tmp_path / name) for name in ('empty.png', 'text.jpg', 'cut.jpg', 'gone.jpg')]
  model = make_model()
  found = list(predict_files(model, [bad[0], paths[0], *bad[1:], paths[1]], top=1, batch=4))
  assert [bool(each.error) for each in found] == [True, False, True, True, True, False]
  assert len({found[i].error for i in (0, 2, 3, 4)}) == 4  # Four different reasons.
  assert 'No such file' in found[4].error
  assert [found[i].labels for i in (1, 5)] == [
    each.labels for each in model.predict(paths[:2], top=1)
  ]


def test_files_folders_and_patterns_expand_to_each_image_once(tmp_path):
  for name in ('b/2.PNG', 'b/1.jpg', 'a.jpeg', 'notes.txt', '.hidden/x.jpg', 'b/._1.jpg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  here = lambda *names: [str(tmp_path / name) for name in names]
  assert find_image_files(here('')) == here('a.jpeg', 'b/1.jpg', 'b/2.PNG')
  assert find_image_files(here('b/2.PNG', 'b', 'notes.txt')) == here(
    'b/2.PNG', 'b/1.jpg', 'notes.txt'
  )
  assert find_image_files(here('*')) == here('a.jpeg', 'b/1.jpg', 'b/2.PNG', 'notes.txt')
  assert find_image_files(here('**/*.jpg')) == here('b/1.jpg')
  (tmp_path / 'odd [1].jpg').touch()
  assert find_image_files(here('odd [1].jpg')) == here('odd [1].jpg')
  for nothing in ('none.jpg', '*.webp'):
    with pytest.raises(UserError, match=re.escape(nothing)):
      find_image_files(here(nothing))


def test_an_existing_folder_in_a_pattern_is_taken_literally(tmp_path):
  folder = tmp_path / '[2026] *' / 'b'
  folder.mkdir(parents=True)
  (folder / 'x1.png').touch()
  (folder / 'y1.png').touch()
  assert find_image_files([str(folder / 'x*.png')]) == [str(folder / 'x1.png')]
  assert find_image_files([str(tmp_path / '[2026] *' / '?' / '[y]1.png')]) == [
    str(folder / 'y1.png')
  ]
