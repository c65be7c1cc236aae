"""Folders and CSV files of images: layouts, splits and errors."""

from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import split_train_test
from vit_jax.data.sources import open_source, open_unlabelled
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
    tmp_path / 'docs' / 'readme.txt',
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
    '\n'.join(['path,labels', *rows, 'images/19.jpg,', 'images/0.jpg,sky', '']), encoding='utf-8'
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
    (['train/cat/a.txt', 'train/dog/b.txt'], r'no class folders.*only 2 \.txt'),
    (['cat/a.jpg', 'dog/b.jpg', 'cow/c.mp4', 'cow/d.mp4'], r'cow is .*without images.*2 \.mp4'),
    (['train/cat/a.jpg', 'train/dog/b.jpg', 'train/cow/c.psd'], r'train/cow.*1 \.psd'),
    (
      ['train/cat/a.jpg', 'train/dog/b.jpg', 'val/cat/a.jpg', 'val/dog/b'],
      'val/dog.*1 no extension',
    ),
    (['cat/a.jpg', 'dog/b.jpg', 'cow/.hidden.jpg'], 'cow is .*without images.* no files'),
    (['x/train/cat/a.jpg', 'x/train/dog/b.jpg', 'y/b.jpg'], 'x is not a class.*use folder:.*x'),
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


def test_the_order_and_the_names_of_old_kinds_of_files_are_unchanged(tmp_path, touch):
  """The checksums are those of the version before nested folders and further extensions."""
  endings = ['.JPG', '.png', '.jpeg', '.gif', '.webp', '.bmp', '.jpg', '.Png', '.jpg']
  for split, counts in (('train', (7, 9)), ('val', (3, 2))):
    for name, count in zip(('B\xe4r', 'ant'), counts, strict=True):
      folder = tmp_path / 'split' / split / name
      touch(*(folder / f'{i}{ending}' for i, ending in enumerate(endings[:count])))
  ant = tmp_path / 'split' / 'train' / 'ant'
  touch(ant / 'notes.txt', ant / '.h.jpg', ant / '\xfcnder 1.jpg')
  for name, count in {'ant': 4, 'bee': 11, 'cow': 20}.items():
    touch(*(tmp_path / 'flat' / name / f'{i}.jpg' for i in range(count)))
  rows = [f'flat/cow/{i}.jpg,{"a;b" if i % 3 else "c"}\n' for i in range(20)]
  (tmp_path / 'l.csv').write_text(''.join(rows), encoding='utf-8')
  sources = [('folder:split', 'train'), ('folder:split', 'val'), ('folder:flat', 'train')]
  sources += [('folder:flat', 'test'), ('csv:l.csv', 'all'), ('images:split', 'train')]
  checksums = []
  for name, split in sources:
    kind, _, path = name.partition(':')
    open_ = open_unlabelled if kind == 'images' else open_source
    checksums.append(open_(f'{kind}:{tmp_path / path}', split).index_checksum())
  assert checksums == [
    'a2cf4acfe8bc62a8', '8e6881a1143f50b6', '015cb5608bf11e83', '769e36dc6634170e',
    'aa6b97bef577fc9c', '929dec107c2ad1a1',
  ]  # fmt: skip


def test_images_in_folders_below_a_class_belong_to_it(tmp_path, touch):
  files = ['2021/06/b.jpg', '2021/a.JPE', 'x.tif', 'y.jfif', 'z.avif', 'z.jp2']
  for split in ('train', 'val'):
    touch(*(tmp_path / split / 'cat' / file for file in files))
    touch(tmp_path / split / 'dog' / 'deep' / 'er' / 'c.png')
  for split in ('train', 'val'):
    source = open_source(f'folder:{tmp_path}', split)
    got = [(source[i][2], source[i][1][0]) for i in range(len(source))]
    assert got == [
      *((str(tmp_path / split / 'cat' / file), 0) for file in files),
      (str(tmp_path / split / 'dog/deep/er/c.png'), 1),
    ]
    assert source[0][0] == b'b.jpg'


def test_files_that_are_passed_over_are_counted_once(flat, touch, capsys):
  touch(*(flat / 'ant' / f'{i}.MOV' for i in range(3)), flat / 'ant' / 'README')
  touch(flat / 'cow' / 'old' / 'a.txt', flat / 'cow' / 'Thumbs.db', flat / 'cow' / '.DS_Store')
  for split in ('train', 'test'):
    open_source(f'folder:{flat}', split)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert '5 files in 2 classes' in lines[0]
  assert 'ant: 3 .mov, 1 no extension; cow: 1 .txt' in lines[0]


def test_nothing_is_printed_if_all_files_are_images(flat, capsys):
  open_source(f'folder:{flat}', 'train')
  assert not capsys.readouterr().err


def test_heic_files_without_pillow_heif_are_passed_over_with_a_remedy(
  flat, touch, monkeypatch, capsys
):
  monkeypatch.setattr('vit_jax.data.image_files.image_extensions', lambda: ('.jpg',))
  touch(flat / 'ant' / 'a.HEIC')
  open_source(f'folder:{flat}', 'train')
  assert "1 .heic); to read HEIC images: pip install 'vit-jax[heic]'" in capsys.readouterr().err
  touch(flat / 'dog' / 'b.heic')
  with pytest.raises(UserError, match=r'dog .*only 1 \.heic.*vit-jax\[heic\]'):
    open_source(f'folder:{flat}', 'train')


def test_composed_and_decomposed_names_are_one_class(tmp_path, touch):
  composed, decomposed = 'caf\u00e9', 'cafe\u0301'
  touch(tmp_path / 'train' / composed / 'a.jpg', tmp_path / 'train' / 'bar' / 'b.jpg')
  touch(tmp_path / 'test' / decomposed / 'c.jpg')
  test = open_source(f'folder:{tmp_path}', 'test')
  assert test.label_names == ('bar', composed)
  assert test[0][1] == (1,)
  touch(tmp_path / 'train' / decomposed / 'd.jpg')
  with pytest.raises(UserError, match='two classes .*NFC and NFD'):
    open_source(f'folder:{tmp_path}', 'test')


@pytest.mark.parametrize('name', ['line\nbreak', 'carriage\rreturn', 'caf\udce9'])
def test_a_class_name_that_is_not_a_line_of_utf8_is_refused(tmp_path, touch, name):
  touch(tmp_path / name / 'a.jpg', tmp_path / 'dog' / 'b.jpg')
  with pytest.raises(UserError, match='rename the class') as error:
    open_source(f'folder:{tmp_path}', 'train')
  assert len(str(error.value).splitlines()) == 1
  str(error.value).encode()


def test_a_file_name_that_is_not_utf8_is_read_and_shown(tmp_path, touch):
  touch(tmp_path / 'cat' / 'b.jpg', tmp_path / 'dog' / 'b.jpg')
  (tmp_path / 'cat' / 'b.jpg').rename(tmp_path / 'cat' / 'caf\udce9.jpg')
  source = open_source(f'folder:{tmp_path}', 'train')
  assert source[0][0] == b'b.jpg'
  assert source[0][2].endswith('caf\\udce9.jpg')


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
  (tmp_path / 'labels.csv').write_text(text, encoding='utf-8')
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


def test_class_counts_are_those_of_the_chosen_examples(tmp_path):
  for name, count in {'a': 3, 'b': 10}.items():
    (tmp_path / 'train' / name).mkdir(parents=True)
    for i in range(count):
      (tmp_path / 'train' / name / f'{i:02}.jpg').write_bytes(b'')
  source = open_source(f'folder:{tmp_path}', 'train')
  assert source.class_counts().tolist() == [3, 10]
  assert source.slice(1, 5).class_counts().tolist() == [2, 2]
  digits = open_source('builtin:digits', 'train')
  labels = [digits[i][1][0] for i in range(len(digits))]
  assert digits.class_counts().tolist() == [labels.count(k) for k in range(10)]
