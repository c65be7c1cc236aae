"""Folders and CSV files of images: layouts, splits and errors."""

from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import split_train_test
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def names(source) -> list[str]:
  return [Path(source[i][2]).name for i in range(len(source))]


def test_splits_of_a_folder_are_sorted_and_any_extension_is_read(tmp_path, touch):
  files = ['a.JPG', 'b.jpeg', 'c.png', 'd.webp', 'e.bmp', 'f.gif']
  touch(
    *(tmp_path / 'train' / 'cat' / name for name in [*reversed(files), '.hidden.jpg', 'notes.txt'])
  )
  touch(
    tmp_path / 'train' / 'dog' / 'x.jpg',
    tmp_path / 'val' / 'dog' / 'y.jpg',
    tmp_path / '.git' / 'a' / 'z.jpg',
  )
  touch(
    tmp_path / 'train' / 'empty' / 'readme.txt',
    tmp_path / 'train' / '.cache' / 'q.jpg',
    tmp_path / 'README.txt',
  )
  (tmp_path / 'val' / 'dog' / 'link.jpg').symlink_to(tmp_path / 'train' / 'dog' / 'x.jpg')
  train, val = (open_source(f'folder:{tmp_path}', split) for split in ('train', ''))
  assert names(train) == [*files, 'x.jpg']
  assert [train[i][1] for i in (0, 6)] == [(0,), (1,)]
  assert (
    train.label_names == val.label_names == ('cat', 'dog')
  )  # `val` has no cats, but a dog is still class 1.
  assert val.split == 'val'
  assert [val[i][:2] for i in range(2)] == [(b'x.jpg', (1,)), (b'y.jpg', (1,))]


def test_a_folder_without_splits_holds_out_a_tenth_of_each_class(flat):
  train, test = (open_source(f'folder:{flat}', split) for split in ('train', 'test'))
  count = lambda source: np.bincount([source[i][1][0] for i in range(len(source))]).tolist()
  assert (count(train), count(test)) == ([3, 10, 18], [1, 1, 2])
  paths = lambda source: {source[i][2] for i in range(len(source))}
  assert not paths(train) & paths(test)
  assert len(paths(train) | paths(test)) == 35
  # Depends only on the names: equal on every machine and in every later version.
  assert names(test) == ['2.jpg', '2.jpg', '15.jpg', '3.jpg']


def test_a_tenth_of_a_class_and_at_least_one_of_two_images_is_held_out():
  names = [b'%d.jpg' % i for i in range(100)]
  sizes = {n: tuple(map(len, split_train_test(names[:n]))) for n in (1, 2, 34, 36, 100)}
  assert sizes == {1: (1, 0), 2: (1, 1), 34: (31, 3), 36: (32, 4), 100: (90, 10)}


def test_a_csv_combines_all_labels_of_an_image(tmp_path, touch):
  touch(*(tmp_path / 'images' / f'{i}.jpg' for i in range(20)))
  rows = [f'images/{i}.jpg,{"sea; sky ;sea" if i % 2 else "land"}' for i in range(19)]
  (tmp_path / 'labels.csv').write_text(
    '\n'.join(['path,labels', *rows, 'images/19.jpg,', 'images/0.jpg,sky', ''])
  )
  train, test = (
    open_source(f'csv:{tmp_path / "labels.csv"}', split) for split in ('train', 'test')
  )
  assert train.label_names == ('land', 'sea', 'sky')
  assert (train.max_labels, len(train) + len(test)) == (2, 20)
  for source in (train, test):
    for i in range(len(source)):
      data, labels, path = source[i]
      assert data.decode() == Path(path).name
      number = int(Path(path).stem)
      assert labels == (
        () if number == 19 else (1, 2) if number % 2 else (0, 2) if number == 0 else (0,)
      )


@pytest.mark.parametrize(
  ('files', 'error'),
  [
    ([], 'no class folders'),
    (['a.jpg', 'b.jpg'], 'no class folders'),
    (['train/cat/a.txt', 'train/dog/b.txt'], 'no class folders'),
    (['cat/a.jpg', 'cat/b.jpg'], r'only one class \(cat\)'),
    (['train/cat/a.jpg', 'val/cat/b.jpg'], r'only one class \(cat\)'),
    (
      ['train/cat/a.jpg', 'train/dog/b.jpg', 'val/dgo/c.jpg'],
      "val/dgo: .*'dgo'.*'dog'",
    ),
    (
      ['train/cat/a.jpg', 'train/dog/b.jpg'],
      'test, validation, val.* train',
    ),
  ],
)
def test_an_unusable_folder_is_an_error_that_names_the_reason(files, error, tmp_path, touch):
  touch(*(tmp_path / file for file in files))
  with pytest.raises(UserError, match=error):
    open_source(f'folder:{tmp_path}', '')


def test_an_archive_or_a_csv_instead_of_a_folder_is_an_error_with_a_remedy(tmp_path, touch):
  touch(tmp_path / 'photos.tar', tmp_path / 'labels.csv')
  with pytest.raises(UserError, match='photos.tar.*unpack'):
    open_source(f'folder:{tmp_path / "photos.tar"}', '')
  with pytest.raises(UserError, match=r'use csv:.*labels\.csv'):
    open_source(f'folder:{tmp_path / "labels.csv"}', '')
  with pytest.raises(UserError, match='use folder:'):
    open_source(f'csv:{tmp_path}', '')


@pytest.mark.parametrize(
  ('text', 'error'),
  [
    ('', 'labels.csv'),
    ('a.jpg,cat\nb.jpg\n', 'line 2: .*path,label;label'),
    ('z.jpg,cat\n', "line 1: .*'z.jpg'"),
    ('a.jpg,cat\nb.jpg,cat\n', r'only one class \(cat\)'),
    ('a.jpg,\nb.jpg,\n', 'no labels'),
  ],
)
def test_an_error_in_a_csv_names_the_line(text, error, tmp_path, touch):
  touch(tmp_path / 'a.jpg', tmp_path / 'b.jpg')
  (tmp_path / 'labels.csv').write_text(text)
  with pytest.raises(UserError, match=error):
    open_source(f'csv:{tmp_path / "labels.csv"}', 'train')


def test_an_image_instead_of_a_csv_is_an_error(tmp_path):
  (tmp_path / 'a.csv').write_bytes(b'\xff\xd8\xff\xe0')
  with pytest.raises(UserError, match=r'a\.csv .*UTF-8'):
    open_source(f'csv:{tmp_path / "a.csv"}', 'train')


def test_a_file_too_large_for_an_image_is_not_read(flat):
  path = flat / 'ant' / '0.jpg'
  with path.open('wb') as sparse:
    sparse.truncate(1 << 40)
  source = open_source(f'folder:{flat}', 'all')
  with pytest.raises(BadImageError, match=r'0.jpg: 1,099,511,627,776 bytes'):
    for i in range(len(source)):
      source[i]


def test_a_deleted_file_is_a_bad_image_with_its_name(flat):
  source = open_source(f'folder:{flat}', 'train')
  Path(source[5][2]).unlink()
  with pytest.raises(BadImageError, match=r'bee/\d+\.jpg: '):
    source[5]
