"""Evaluation of a pre-trained model, against NumPy on its logits; classes in another order; pictures."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.pretrained.released_layout import google_file
from vit_jax.config import DataConfig, ModelConfig
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.report import differences, draw_confusion, evaluate, match_classes, per_class
from vit_jax.pretrained.labels import class_names, synsets

NAMES = ('cat', 'cow', 'dog', 'hen')
SIZE = (16, 16)
DATA = DataConfig(eval_batch=16, size=SIZE)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """37 photographs: not a multiple of any batch, not the same number of each class."""
  root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
  for i in range(37):
    folder = root / 'val' / NAMES[(0, 1, 1, 2, 3)[i % 5]]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / f'{i:02}.png')
  return open_source(f'folder:{root}', 'val')


def model(tmp_path, labels=NAMES, **fields):
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4', **fields), classes=len(labels) or 4, size=SIZE)
  return vit_jax.load(str(tmp_path / 'model.npz'), labels=labels or None)


def by_hand(ours, source):
  """(true, predicted) class of the model's for every example."""
  images, names = [], []
  for i in range(len(source)):
    data, labels, _ = source[i]
    images.append(np.asarray(Image.open(io.BytesIO(data))))
    names.append(source.label_names[labels[0]])
  true = np.array([ours.labels.index(name) for name in names])
  return true, np.asarray(ours.logits(np.stack(images)), np.float64)


@pytest.mark.parametrize('labels', [NAMES, NAMES[::-1], ('ant', *NAMES, 'owl')], ids=['same', 'reversed', 'more'])
def test_accuracy_loss_and_confusion_are_those_of_the_logits(tmp_path, source, labels):
  ours = model(tmp_path, labels)
  true, logits = by_hand(ours, source)
  predicted = logits.argmax(axis=1)
  report = evaluate(ours, source, DATA)
  assert report.result['examples'] == 37
  assert report.result['accuracy'] == np.mean(true == predicted)
  shifted = logits - logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(37), true]
  assert report.result['loss'] == pytest.approx(losses.mean(), abs=1e-5)
  confusion = np.zeros((len(labels), len(labels)), int)
  np.add.at(confusion, (true, predicted), 1)
  np.testing.assert_array_equal(report.confusion, confusion)
  np.testing.assert_array_equal(report.correct, np.diag(confusion))
  rows = list(csv.DictReader(io.StringIO(per_class(report, ours.labels))))
  assert {row['class']: int(row['examples']) for row in rows} == {name: (true == labels.index(name)).sum() for name in NAMES}
  assert sum(int(row['correct']) for row in rows) == (true == predicted).sum()


def test_classes_are_matched_by_name(tmp_path, source):
  mapping, said = match_classes(model(tmp_path, NAMES[::-1]), source)
  assert (mapping.tolist(), said) == ([3, 2, 1, 0], '')
  _, said = match_classes(model(tmp_path, ('ant', *NAMES)), source)
  assert said == 'the data has 4 of the 5 classes; a prediction may be any'
  mapping, said = match_classes(model(tmp_path, ()), source)
  assert mapping.tolist() == [0, 1, 2, 3]
  assert 'no names for its classes' in said
  with pytest.raises(UserError, match=r"only the data has \['dog', 'hen'\], only .* has \['owl'\]"):
    match_classes(model(tmp_path, ('cat', 'cow', 'owl')), source)


class Synsets:
  """As TFDS's imagenet2012 calls its classes."""

  label_names = synsets('imagenet1k')


def test_imagenets_synsets_are_its_classes(tmp_path):
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4'), classes=1000, size=SIZE)
  ours = vit_jax.load(str(tmp_path / 'model.npz'))
  assert ours.labels == class_names('imagenet1k')
  mapping, said = match_classes(ours, Synsets)
  assert (mapping.tolist(), said) == (list(range(1000)), '')


def test_several_labels_an_example_have_an_accuracy_and_no_confusion(tmp_path, source):
  lines = ['path,label', *(f'{source[i][2]},{source.label_names[source[i][1][0]]};hen' for i in range(len(source)))]
  (tmp_path / 'labels.csv').write_text('\n'.join(lines))
  several = open_source(f'csv:{tmp_path / "labels.csv"}', 'all')
  ours = model(tmp_path)
  report = evaluate(ours, several, DATA)
  true, logits = by_hand(ours, source)
  predicted = logits.argmax(axis=1)
  assert report.result['accuracy'] == np.mean((predicted == true) | (predicted == NAMES.index('hen')))
  with pytest.raises(UserError, match='have several labels'):
    per_class(report, ours.labels)
  with pytest.raises(UserError, match='have several labels'):
    draw_confusion(report, ours.labels, tmp_path / 'no.png')


def test_the_confusion_matrix_is_a_picture(tmp_path, source):
  draw_confusion(evaluate(model(tmp_path), source, DATA), NAMES, tmp_path / 'confusion.png')
  with Image.open(tmp_path / 'confusion.png') as picture:
    assert min(picture.size) > 300
    assert len(picture.convert('RGB').getcolors(1 << 24)) > 10


def test_what_differs_from_how_the_model_was_made_is_said():
  own = {'size': (224, 224), 'crop': 'resize'}
  assert list(differences({'size': (384, 384), 'crop': 'resize'}, own)) == ['size 384x384 instead of 224x224']
