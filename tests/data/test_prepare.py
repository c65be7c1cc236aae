"""Preparing TFDS datasets without TensorFlow: building, converting TFRECORD, and errors."""

import importlib.util
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from vit_jax.data.decode import decode_image
from vit_jax.data.prepare import (
  SourceRow,
  convert_tfrecord_file,
  list_sources,
  prepare_dataset,
  read_tfrecords,
)
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

without_tensorflow = pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='needs an environment without TensorFlow',
)


class TinyShapes(tfds.core.GeneratorBasedBuilder):
  """A dataset that importing this file adds to TFDS's catalog as tiny_shapes."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(),
      'label': tfds.features.ClassLabel(names=['disc', 'square']),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(6), 'test': self._generate_examples(2)}

  def _generate_examples(self, count):
    for i in range(count):
      yield (
        i,
        {
          'image': cv2.imencode('.png', np.full((4, 4, 3), i, np.uint8))[1].tobytes(),
          'label': i % 2,
        },
      )


def write_tfrecords(path: Path, records: list[bytes]):
  path.write_bytes(b''.join(struct.pack('<QI', len(each), 0) + each + bytes(4) for each in records))


@pytest.fixture
def tfrecord_set(numbered) -> Path:
  """Rewrite tfds:numbered as TFRECORD, TFDS's default."""
  dir = numbered / 'numbered' / '1.2.3'
  for path in dir.glob('*.array_record-*'):
    records = list(ArrayRecordDataSource(str(path)))
    write_tfrecords(path.with_name(path.name.replace('array_record', 'tfrecord')), records)
    path.unlink()
  info = dir / 'dataset_info.json'
  info.write_text(
    info.read_text(encoding='utf-8').replace('array_record', 'tfrecord'), encoding='utf-8'
  )
  return numbered


def test_a_tfrecord_dataset_is_converted_to_the_same_examples(tfrecord_set):
  dir = str(tfrecord_set)
  with pytest.raises(UserError, match=r'TFRECORD .*python -m vit_jax data prepare numbered'):
    open_source('tfds:numbered', 'train', dir=dir)
  row = prepare_dataset('tfds:numbered', dir)
  assert row == SourceRow('tfds:numbered', 'train 10, validation 4', '3 classes', '')
  source = open_source('tfds:numbered', 'train', dir=dir)
  assert [source[i][1] for i in range(10)] == [(i % 3,) for i in range(10)]
  assert (
    len(list(tfrecord_set.glob('numbered/1.2.3/*.tfrecord-*'))) == 3
  )  # The TFRECORD files stay.
  assert prepare_dataset('numbered', dir) == row  # Nothing is left to do.


def test_an_interrupted_conversion_continues(tfrecord_set):
  shards = sorted(tfrecord_set.glob('numbered/1.2.3/*.tfrecord-*'))
  done = shards[0].with_name(shards[0].name.replace('tfrecord', 'array_record'))
  convert_tfrecord_file(shards[0], done, len(list(read_tfrecords(shards[0]))))
  before = done.stat()
  shards[1].with_name(
    'incomplete.' + shards[1].name.replace('tfrecord', 'array_record')
  ).write_bytes(b'half')
  prepare_dataset('numbered', str(tfrecord_set))
  assert done.stat().st_mtime_ns == before.st_mtime_ns
  assert not list(tfrecord_set.glob('numbered/1.2.3/incomplete.*'))


def test_records_of_any_length_are_read_and_a_truncated_file_is_an_error(tmp_path):
  records = [b'', b'a', bytes(range(256)) * 300, b'end']
  path = tmp_path / 'x.tfrecord'
  write_tfrecords(path, records)
  assert list(read_tfrecords(path)) == records
  for cut in (1, 4, 6, 14):
    (tmp_path / 'cut').write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match='/cut '):
      list(read_tfrecords(tmp_path / 'cut'))


def test_a_file_with_too_few_records_leaves_nothing_behind(tmp_path):
  write_tfrecords(tmp_path / 'x.tfrecord', [b'a', b'b'])
  with pytest.raises(UserError, match=r'x\.tfrecord has 2 .* 3'):
    convert_tfrecord_file(tmp_path / 'x.tfrecord', tmp_path / 'x.array_record', 3)
  assert [path.name for path in tmp_path.iterdir()] == ['x.tfrecord']


def test_a_builder_without_tensorflow_builds_array_record(tmp_path):
  row = prepare_dataset('tiny_shapes', str(tmp_path))
  assert row == SourceRow('tfds:tiny_shapes', 'train 6, test 2', '2 classes', '')
  data, (label,), name = open_source('tfds:tiny_shapes', '', dir=str(tmp_path))[1]
  assert (
    decode_image(data, name=name, max_pixels=16)[0, 0, 0] == label
  )  # TFDS shuffles. Even images are discs, odd ones squares.


@without_tensorflow
@pytest.mark.parametrize('name', ['cifar10', 'tfds:cifar10', 'voc/2007'])
def test_a_builder_that_needs_tensorflow_names_the_extra_before_it_downloads(name, tmp_path):
  with pytest.raises(UserError, match=r"pip install 'vit-jax\[prepare\]'"):
    prepare_dataset(name, str(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'error'),
  [
    ('imagenet21k', 'not in TFDS'),
    ('cifr10', "Did you mean 'cifar10'"),
    ('builtin:digits', 'builtin:digits'),
    ('oxford_flowers102:9.9.9', 'cannot be loaded at version 9.9.9'),
    ('voc/nope', 'BuilderConfig nope not found'),
  ],
)
def test_a_dataset_that_cannot_be_prepared_is_a_one_line_error(name, error, tmp_path):
  with pytest.raises(UserError, match=error) as caught:
    prepare_dataset(name, str(tmp_path))
  assert '\n' not in str(caught.value)


def test_a_manual_download_is_an_error_with_its_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(
    TinyShapes, 'MANUAL_DOWNLOAD_INSTRUCTIONS', 'Fetch shapes.zip\n  from its site.'
  )
  with pytest.raises(UserError, match=r'downloads/manual: Fetch shapes\.zip from its site'):
    prepare_dataset('tiny_shapes', str(tmp_path))


def test_the_list_has_builtin_and_prepared_datasets_and_their_problems(
  tfrecord_set,
):
  rows = {row.source: row for row in list_sources(str(tfrecord_set))}
  assert list(rows) == ['builtin:digits', 'builtin:fashion_mnist', 'tfds:numbered']
  assert rows['builtin:fashion_mnist'] == SourceRow(
    'builtin:fashion_mnist', 'train 30,000, test 10,000', '10 classes', ''
  )
  assert 'data prepare numbered' in rows['tfds:numbered'].note
  assert [row.source for row in list_sources(str(tfrecord_set / 'nothing'))] == list(rows)[:2]


@pytest.mark.parametrize('name', ['[tf]', 'a*b', "it's ?", 'back\\slash'])
def test_prepared_data_in_a_directory_of_any_name_are_listed_and_read(
  tmp_path, write_tfds, png, name
):
  features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(num_classes=3)}
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  examples = [{'image': png(image), 'label': label} for label in (2, 0)]
  write_tfds('one', tmp_path / name, features, {'train': examples})
  assert 'tfds:one' in {row.source for row in list_sources(str(tmp_path / name))}
  source = open_source('tfds:one', 'train', dir=str(tmp_path / name))
  assert [source[i][1] for i in range(2)] == [(2,), (0,)]
