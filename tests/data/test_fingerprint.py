"""The fingerprint of the data changes with the data and with nothing else."""

import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.fingerprint import describe_differences, fingerprint_data, source_facts
from vit_jax.data.images import sample_crop_box
from vit_jax.data.sampler import random_bits, shuffled_example
from vit_jax.data.sources import open_source


@pytest.fixture
def photos(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(40):
    path = (
      tmp_path
      / 'photos'
      / ('train' if i < 30 else 'test')
      / ('cat' if i % 2 else 'dog')
      / f'{i:02}.png'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
      cv2.imencode('.png', rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))[1].tobytes()
    )
  return tmp_path / 'photos'


def fingerprint_folder(root, split: str = 'train') -> dict:
  return fingerprint_data(
    open_source(f'folder:{root}', split), open_source(f'folder:{root}', 'test')
  )


ALL = {'examples', 'listing', 'content'}
CHANGES = {
  # Name -> (a change of the folder, the facts that differ).
  'one more image': (lambda train: shutil.copy(train / 'cat/01.png', train / 'cat/99.png'), ALL),
  'one image less': (lambda train: (train / 'cat/01.png').unlink(), ALL),
  'another name': (
    lambda train: (train / 'cat/01.png').rename(train / 'cat/00.png'),
    {'listing'},
  ),
  'another class': (
    lambda train: (train / 'cat/03.png').rename(train / 'dog/03.png'),
    {'listing', 'content'},
  ),
  'other pixels': (
    lambda train: shutil.copy(train / 'cat/03.png', train / 'cat/01.png'),
    {'content'},
  ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_of_the_training_data_is_named(photos, change):
  before = fingerprint_folder(photos)
  CHANGES[change][0](photos / 'train')
  changed = {
    line.partition(':')[0] for line in describe_differences(before, fingerprint_folder(photos))
  }
  assert changed == {f'train.{fact}' for fact in CHANGES[change][1]}


def test_a_change_of_the_evaluation_data_is_named(photos):
  before = fingerprint_folder(photos)
  (photos / 'test/cat/31.png').unlink()
  assert {
    line.partition(':')[0] for line in describe_differences(before, fingerprint_folder(photos))
  } == {f'eval.{fact}' for fact in ALL}
  assert 'eval.examples: 10 there, 9 here' in describe_differences(
    before, fingerprint_folder(photos)
  )


def test_another_slice_of_the_same_size_differs(photos):
  assert describe_differences(
    fingerprint_folder(photos, 'train[:15]'), fingerprint_folder(photos, 'train[15:]')
  )


def test_the_same_data_in_another_folder_is_equal(photos, tmp_path):
  shutil.copytree(photos, tmp_path / 'copy')
  assert fingerprint_folder(photos) == fingerprint_folder(tmp_path / 'copy')


def test_slices_of_a_tfds_dataset_differ(numbered):
  source = lambda split: open_source('tfds:numbered', split, dir=str(numbered))
  assert fingerprint_data(source('train'), source('validation')) == fingerprint_data(
    source('train'), source('validation')
  )
  assert describe_differences(
    fingerprint_data(source('train'), source('validation')),
    fingerprint_data(source('train[:9]'), source('validation')),
  )


def changed_facts(source, other) -> set[str]:
  before, after = source_facts(source), source_facts(other)
  return {name for name in before if before[name] != after[name]}


def test_another_label_in_a_csv_changes_its_listing_and_content(photos):
  names = [f'train/{"cat" if i % 2 else "dog"}/{i:02}.png' for i in range(30)]
  sources = []
  for labels in ('abc', 'bca'):
    path = photos / f'{labels}.csv'
    path.write_text(
      ''.join(f'{name},{labels[i % 3]}\n' for i, name in enumerate(names)), encoding='utf-8'
    )
    sources.append(open_source(f'csv:{path}', 'all'))
  assert changed_facts(*sources) == {'listing', 'content'}


def test_another_label_in_a_tfds_record_changes_the_content(tmp_path, write_tfds, png):
  image = png(np.zeros((2, 2, 3), np.uint8))
  features = {
    'image': tfds.features.Image(),
    'label': tfds.features.ClassLabel(names=['a', 'b']),
  }
  sources = []
  for label in (0, 1):
    dir = tmp_path / str(label)
    write_tfds('one', dir, features, {'train': [{'image': image, 'label': label}]})
    sources.append(open_source('tfds:one', 'train', dir=str(dir)))
  assert changed_facts(*sources) == {'content'}


def test_order_and_augmentation_match_their_versions():
  """A failure means that runs cannot be resumed.

  Increase sampler.ORDER_VERSION or images.AUGMENTATION_VERSION, and update these numbers.
  """
  assert [shuffled_example(position, 1000, 7)[1] for position in range(6)] == [
    197,
    915,
    695,
    152,
    854,
    768,
  ]
  boxes = [
    sample_crop_box(333, 500, key=(3, 1, i), area=(0.05, 1.0), aspect=(3 / 4, 4 / 3))
    for i in range(3)
  ]
  assert boxes == [(5, 31, 245, 233), (10, 253, 144, 152), (36, 199, 121, 147)]
  assert [random_bits((3, 1, i), 0)[-1] >> 63 for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
