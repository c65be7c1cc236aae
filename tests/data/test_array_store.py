"""IDX files are read as their format states, and damage is an error that names the file."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

DEBIAN = Path('/usr/share/datasets/fashion-mnist')  # The package dataset-fashion-mnist.
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
LABELS = np.array([2, 0, 1, 1, 2, 0], np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
  """Return an array of bytes in the format: magic number, sizes as big-endian int32, data."""
  sizes = struct.pack(f'>{array.ndim}i', *array.shape)
  return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_split(folder: Path, prefix: str, images=IMAGES, labels=LABELS, *, compress: bool = True):
  for name, array in (('images-idx3', images), ('labels-idx1', labels)):
    content, path = idx_bytes(array), folder / f'{prefix}-{name}-ubyte'
    if compress:
      path, content = path.with_name(f'{path.name}.gz'), gzip.compress(content)
    path.write_bytes(content)


@pytest.mark.parametrize('compress', [True, False])
def test_images_and_labels_are_those_of_the_files(tmp_path, compress):
  write_split(tmp_path, 'train', compress=compress)
  write_split(tmp_path, 't10k', IMAGES[::-1], LABELS[::-1], compress=compress)
  source = pickle.loads(pickle.dumps(open_source(f'idx:{tmp_path}', 'train')))
  assert source.label_names == ('0', '1', '2')
  assert source.class_counts().tolist() == [2, 2, 2]
  for i in range(6):
    data, labels, name = source[i]
    np.testing.assert_array_equal(data, IMAGES[i])
    assert labels == (LABELS[i],) and name == f'idx:{tmp_path} train #{i}'
  np.testing.assert_array_equal(open_source(f'idx:{tmp_path}', '')[0][0], IMAGES[-1])  # `test`.


def test_labels_txt_names_the_classes(tmp_path):
  write_split(tmp_path, 'train')
  (tmp_path / 'labels.txt').write_text('shirt\ncoat\nbag\n', encoding='utf-8')
  assert open_source(f'idx:{tmp_path}', 'train').label_names == ('shirt', 'coat', 'bag')
  (tmp_path / 'labels.txt').write_text('shirt\ncoat\n', encoding='utf-8')
  with pytest.raises(UserError, match=r'labels\.txt names 2 classes, but the labels go up to 2'):
    open_source(f'idx:{tmp_path}', 'train')


def damage(folder: Path, name: str, change):
  path = folder / f'train-{name}-ubyte.gz'
  path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('labels-idx1', lambda old: gzip.compress(gzip.decompress(old)[:-1]), 'ends early'),
    ('labels-idx1', lambda old: gzip.compress(gzip.decompress(old) + b'\0'), 'longer than'),
    ('labels-idx1', lambda old: gzip.compress(idx_bytes(LABELS[:5])), '6 images, but'),
    ('labels-idx1', lambda old: gzip.compress(idx_bytes(IMAGES)), '00000801'),
    ('images-idx3', lambda old: gzip.compress(b'\x89PNG' + bytes(40)), '00000803'),
    ('images-idx3', lambda old: gzip.compress(b''), 'ends early'),
    ('images-idx3', lambda old: old[:12], 'damaged'),
    ('images-idx3', lambda old: old[:14] + bytes([old[14] ^ 255]) + old[15:], 'damaged'),
  ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, change, message):
  write_split(tmp_path, 'train')
  damage(tmp_path, name, change)
  with pytest.raises(UserError, match=message) as error:
    open_source(f'idx:{tmp_path}', 'train')[0]
  assert str(tmp_path) in str(error.value)


def test_a_directory_without_such_files_is_an_error(tmp_path):
  with pytest.raises(UserError, match='train-images-idx3-ubyte'):
    open_source(f'idx:{tmp_path}', 'train')
  write_split(tmp_path, 'train')
  (tmp_path / 'train-labels-idx1-ubyte.gz').unlink()
  with pytest.raises(UserError, match='no file train-labels-idx1-ubyte'):
    open_source(f'idx:{tmp_path}', 'train')


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f'no {DEBIAN}')
def test_fashion_mnist_of_debian_is_that_of_the_package():
  ours, theirs = (open_source(name, 'test') for name in ('builtin:fashion_mnist', f'idx:{DEBIAN}'))
  assert len(ours) == len(theirs) == 10_000
  assert len(open_source(f'idx:{DEBIAN}', 'train')) == 60_000
  for i in (0, 1, 4999, 9999):
    np.testing.assert_array_equal(ours[i][0], theirs[i][0])
    assert ours[i][1] == theirs[i][1]
