"""Folders and CSV files of images: their layouts, their splits, and what a wrong one gets."""

from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.images import BadImageError
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def names(source) -> list[str]:
  return [Path(source[i][2]).name for i in range(len(source))]


def test_a_folder_with_splits_reads_them_in_sorted_order_whatever_the_extension(tmp_path, touch):
  shown = ['a.JPG', 'b.jpeg', 'c.png', 'd.webp', 'e.bmp', 'f.gif']
  touch(
    *(tmp_path / 'train' / 'cat' / name for name in [*reversed(shown), '.hidden.jpg', 'notes.txt'])
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
  assert names(train) == [*shown, 'x.jpg']
  assert [train[i][1] for i in (0, 6)] == [(0,), (1,)]
  assert (
    train.label_names == val.label_names == ('cat', 'dog')
  )  # `val` has no cats: a dog is still 1.
  assert val.split == 'val'
  assert [val[i][:2] for i in range(2)] == [(b'x.jpg', (1,)), (b'y.jpg', (1,))]


def test_a_folder_without_splits_holds_out_a_tenth_of_each_class(flat):
  train, test = (open_source(f'folder:{flat}', split) for split in ('train', 'test'))
  count = lambda source: np.bincount([source[i][1][0] for i in range(len(source))]).tolist()
  assert (count(train), count(test)) == ([3, 10, 18], [1, 1, 2])
  paths = lambda source: {source[i][2] for i in range(len(source))}
  assert not paths(train) & paths(test)
  assert len(paths(train) | paths(test)) == 35
  # By names only: the same division on every machine and in every later version.
  assert names(test) == ['2.jpg', '2.jpg', '15.jpg', '3.jpg']


def test_a_csv_gives_every_label_of_an_image(tmp_path, touch):
  touch(*(tmp_path / 'images' / f'{i}.jpg' for i in range(20)))
  rows = [f'images/{i}.jpg,{"sea; sky ;sea" if i % 2 else "land"}' for i in range(19)]
  (tmp_path / 'labels.csv').write_text(
    '\n'.join(['path,labels', *rows, 'images/19.jpg,', 'images/0.jpg,sky', ''])
  )
  train, test = (
    open_source(f'csv:{tmp_path / "labels.csv"}', split) for split in ('train', 'test')
  )
  assert train.label_names == ('land', 'sea', 'sky')
  assert (train.most_labels, len(train) + len(test)) == (2, 20)
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
    ([], 'holds no class folders with images'),
    (['a.jpg', 'b.jpg'], 'holds no class folders with images'),
    (['train/cat/a.txt', 'train/dog/b.txt'], 'holds no class folders with images'),
    (['cat/a.jpg', 'cat/b.jpg'], r'one class only \(cat\)'),
    (['train/cat/a.jpg', 'val/cat/b.jpg'], r'one class only \(cat\)'),
    (
      ['train/cat/a.jpg', 'train/dog/b.jpg', 'val/dgo/c.jpg'],
      "val/dgo holds .*: 'dgo'. Did you mean 'dog'",
    ),
    (
      ['train/cat/a.jpg', 'train/dog/b.jpg'],
      'none of the splits test, validation, val.*it has train; name one',
    ),
  ],
)
def test_a_folder_that_cannot_be_learnt_from_says_why(files, error, tmp_path, touch):
  touch(*(tmp_path / file for file in files))
  with pytest.raises(UserError, match=error):
    open_source(f'folder:{tmp_path}', '')


def test_an_archive_or_a_csv_in_place_of_a_folder_says_what_to_do(tmp_path, touch):
  touch(tmp_path / 'photos.tar', tmp_path / 'labels.csv')
  with pytest.raises(UserError, match='an archive must be unpacked first'):
    open_source(f'folder:{tmp_path / "photos.tar"}', '')
  with pytest.raises(UserError, match=r'csv:.*labels\.csv reads it'):
    open_source(f'folder:{tmp_path / "labels.csv"}', '')
  with pytest.raises(UserError, match='is a folder, not a CSV'):
    open_source(f'csv:{tmp_path}', '')


@pytest.mark.parametrize(
  ('text', 'error'),
  [
    ('', 'holds no lines'),
    ('a.jpg,cat\nb.jpg\n', 'line 2: expected path,label;label but got 1 columns'),
    ('z.jpg,cat\n', "line 1: no image 'z.jpg' in"),
    ('a.jpg,cat\nb.jpg,cat\n', r'one class only \(cat\)'),
    ('a.jpg,\nb.jpg,\n', 'no labels'),
  ],
)
def test_a_wrong_csv_names_the_line(text, error, tmp_path, touch):
  touch(tmp_path / 'a.jpg', tmp_path / 'b.jpg')
  (tmp_path / 'labels.csv').write_text(text)
  with pytest.raises(UserError, match=error):
    open_source(f'csv:{tmp_path / "labels.csv"}', 'train')


def test_an_image_in_place_of_a_csv_is_no_csv(tmp_path):
  (tmp_path / 'a.csv').write_bytes(b'\xff\xd8\xff\xe0')
  with pytest.raises(UserError, match=r'a\.csv is no CSV file in UTF-8'):
    open_source(f'csv:{tmp_path / "a.csv"}', 'train')


def test_a_file_that_no_image_can_be_is_not_read(flat):
  path = flat / 'ant' / '0.jpg'
  with path.open('wb') as sparse:
    sparse.truncate(1 << 40)
  source = open_source(f'folder:{flat}', 'all')
  with pytest.raises(
    BadImageError, match=r'0.jpg: 1,099,511,627,776 bytes are more than any image has'
  ):
    for i in range(len(source)):
      source[i]


def test_a_file_that_went_away_is_a_bad_image_with_its_name(flat):
  source = open_source(f'folder:{flat}', 'train')
  Path(source[5][2]).unlink()
  with pytest.raises(BadImageError, match=r'bee/\d+\.jpg: cannot be read'):
    source[5]
