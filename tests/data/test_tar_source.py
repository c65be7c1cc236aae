"""WebDataset archives: examples, labels, splits, the index, and what is refused."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from vit_jax.config import DataConfig
from vit_jax.data.archive_store import name_split
from vit_jax.data.decode import BadImageError
from vit_jax.data.loader import eval_batches, train_batches
from vit_jax.data.pack import PackOptions, pack_source
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.data.tar_source import TarStore
from vit_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Keep indices in a directory of the test, and return it."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'vit_jax' / 'index'


def write_tar(path, files: dict[str, bytes]):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def images(png) -> list[bytes]:
  """Return twelve images. The pixels of image i are i."""
  return [png(np.full((6, 7, 3), i, np.uint8)) for i in range(12)]


def contents(source) -> list:
  return [source[i][:2] for i in range(len(source))]


def test_the_labels_are_class_numbers_class_names_or_json(tmp_path, images):
  numbers = {}
  for i, image in enumerate(images):
    numbers |= {f'a/{i:03d}.png': image, f'a/{i:03d}.cls': f'{i % 3}\n'.encode()}
  write_tar(tmp_path / 'numbers.tar', numbers)
  source = open_source(f'tar:{tmp_path / "numbers.tar"}', 'train')
  assert contents(source) == [(image, (i % 3,)) for i, image in enumerate(images)]
  assert (source.label_names, source.max_labels) == (('0', '1', '2'), 1)
  assert source[4][2] == f'{tmp_path / "numbers.tar"} a/004.png'
  assert source.class_counts().tolist() == [4, 4, 4] and source.is_user_file(0)
  (tmp_path / 'labels.txt').write_text('ant\nbee\ncow\ndog\n', encoding='utf-8')
  source = open_source(f'tar:{tmp_path / "numbers.tar"}', 'train')
  assert source.label_names == ('ant', 'bee', 'cow', 'dog')

  names = {}
  for i, image in enumerate(images):  # The label may come first, and other files are ignored.
    names |= {f'{i}.txt': b'bee' if i % 2 else b'ant', f'{i}.seg.png': b'', f'{i}.png': image}
  write_tar(tmp_path / 'names.tar', names)
  source = open_source(f'tar:{tmp_path / "names.tar"}', 'train[2:5]')
  assert contents(source) == [(images[2], (0,)), (images[3], (1,)), (images[4], (0,))]
  assert source.label_names == ('ant', 'bee')

  objects = {}
  for i, label in enumerate(
    ({'label': 2}, {'labels': [0, 1]}, {'cls': '1', 'label': None}, {'labels': []})
  ):
    objects |= {f'{i}.PNG': images[i], f'{i}.json': json.dumps(label).encode()}
  write_tar(tmp_path / 'objects.tar', objects)
  source = open_source(f'tar:{tmp_path / "objects.tar"}', 'train')
  assert [source[i][1] for i in range(4)] == [(2,), (0, 1), (1,), ()]
  assert source.max_labels == 2


@pytest.fixture
def folder(tmp_path, images):
  """Return a folder of three archives: twelve examples of `train`, four of `val`."""
  for name, chosen in {'train-0': range(8), 'train-1': range(8, 12), 'val-0': range(4)}.items():
    files = {}
    for i in chosen:
      files |= {f'{i:02d}.png': images[i], f'{i:02d}.cls': str(i % 2).encode()}
    write_tar(tmp_path / 'sets' / f'{name}.tar', files)
  return tmp_path / 'sets'


def test_splits_are_named_by_the_files_and_batches_are_pure(folder, images):
  source = open_source(f'tar:{folder}', 'train')
  assert contents(source) == [(image, (i % 2,)) for i, image in enumerate(images)]
  assert open_source(f'tar:{folder}', '').split == 'val'
  assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
  data = DataConfig(batch=4, size=(6, 6), threads=3)
  late = next(train_batches(source, data, seed=0, start=2, host=0, hosts=1))
  stream = train_batches(source, data, seed=0, start=0, host=0, hosts=1)
  third = [next(stream) for _ in range(3)][2]
  assert all(np.array_equal(late[key], third[key]) for key in late)


def test_a_packed_archive_gives_the_same_batches(folder, tmp_path):
  pack_source(f'tar:{folder}', tmp_path / 'out', PackOptions(shards=2))
  data = DataConfig(batch=4, size=(6, 6))
  for split in ('train', 'val', 'train/held_out:30%'):
    sources = [open_source(name, split) for name in (f'tar:{folder}', f'records:{tmp_path}/out')]
    assert sources[0].kind == sources[1].kind == 'tar'
    for one, other in zip(
      *(eval_batches(source, data, host=0, hosts=1) for source in sources), strict=True
    ):
      assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
  ('path', 'split'),
  [
    ('imagenet1k-train-0001.tar', 'train'), ('imagenet1k-validation-01.tar', 'validation'),
    ('0001.tar', 'train'), ('sets/val/0001.tar', 'val'), ('train_photos/test-1.tar', 'test'),
    ('data/test-00000-of-00001.parquet', 'test'), ('contest.tar', 'train'),
    ('data/unseen-00000-of-00002-0123abcd.parquet', 'unseen'),
    ('ds/train/part-00000-of-00001.tar', 'train'), ('ds/val/part-00000-of-00001.tar', 'val'),
    ('ds/val/photos-00000-of-00001.tar', 'val'), ('ds/part-00000-of-00001.tar', 'train'),
    ('ds/test_extra-00000-of-00001.tar', 'test_extra'),
  ],
)  # fmt: skip
def test_a_file_is_of_the_split_that_its_path_names(path, split, tmp_path):
  assert name_split((tmp_path / path).relative_to(tmp_path)) == split


def test_an_archive_is_indexed_once_until_it_changes(folder, images, cache, monkeypatch):
  open_source(f'tar:{folder}', 'train')
  assert len(list(cache.iterdir())) == 3
  built, index_file = [], TarStore.index_file
  monkeypatch.setattr(
    TarStore, 'index_file', lambda store, path: built.append(path.name) or index_file(store, path)
  )
  open_source(f'tar:{folder}', 'train')
  assert built == []
  write_tar(folder / 'val-0.tar', {'x.png': images[5], 'x.cls': b'1'})
  os.utime(folder / 'train-1.tar', ns=(1, 1))
  next(iter(cache.iterdir())).write_bytes(b'damaged')
  source = open_source(f'tar:{folder}', 'val')
  assert {'train-1.tar', 'val-0.tar'} <= set(built) and len(built) <= 3
  assert contents(source) == [(images[5], (1,))]


def test_an_archive_that_changes_later_is_a_bad_image(folder):
  source = open_source(f'tar:{folder}', 'val')
  os.utime(folder / 'val-0.tar', ns=(1, 1))
  with pytest.raises(BadImageError, match=r'val-0\.tar 02\.png: the archive has changed'):
    source[2]
  (folder / 'val-0.tar').unlink()
  with pytest.raises(BadImageError, match='No such file'):
    source[2]


def test_labels_are_not_needed_for_a_teacher(tmp_path, images):
  write_tar(tmp_path / 'a.tar', {f'{i}.png': image for i, image in enumerate(images)})
  source = open_unlabelled(f'tar:{tmp_path / "a.tar"}', 'train')
  assert contents(source) == [(image, ()) for image in images]


@pytest.mark.parametrize(
  ('files', 'problem'),
  [
    ({'a.png': b'', 'b.png': b'', 'b.cls': b'1'}, 'a.png has no label'),
    ({'a.png': b'', 'a.cls': b''}, 'a.cls is not a label'),
    ({'a.png': b'', 'a.json': b'{"label": 1.5}'}, 'a.json is not a label'),
    ({'a.png': b'', 'a.json': b'[1]'}, 'a.json is not a label'),
    ({'a.png': b'', 'a.json': b'{"caption": "x"}'}, 'a.png has no label'),
    ({'a.png': b'', 'a.cls': b'1', 'b.png': b'', 'b.txt': b'x'}, 'numbers.*names'),
    ({'a.png': b'', 'a.txt': b'x'}, 'only one class'),
    ({'a.txt': b'x'}, 'no images'),
    ({'a.png': b'', 'a.cls': b'1234567'}, r'a\.cls .*less than 1,000,000.* got 1234567'),
    ({'a.png': b'', 'a.json': b'{"label": 99999999999}'}, r'a\.json .*less than 1,000,000'),
    ({'a.png': b'', 'a.json': b'[' * 100_000}, r'a\.json is not a label'),
  ],
)
def test_a_wrong_archive_is_a_one_line_error(files, problem, tmp_path):
  write_tar(tmp_path / 'x.tar', files)
  with pytest.raises(UserError, match=problem) as caught:
    open_source(f'tar:{tmp_path / "x.tar"}', 'train')
  assert '\n' not in str(caught.value)


def test_a_compressed_truncated_or_missing_archive_is_an_error(folder, tmp_path):
  with tarfile.open(tmp_path / 'x.tar', 'w:gz') as archive:
    archive.add(folder / 'val-0.tar', 'a.png')
  with pytest.raises(UserError, match='compressed with gzip'):
    open_source(f'tar:{tmp_path / "x.tar"}', 'train')
  content = (folder / 'val-0.tar').read_bytes()
  (tmp_path / 'y.tar').write_bytes(content[:1000])
  with pytest.raises(UserError, match='not a tar archive'):
    open_source(f'tar:{tmp_path / "y.tar"}', 'train')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'no \.tar files'):
    open_source(f'tar:{tmp_path / "empty"}', 'train')
  with pytest.raises(UserError, match='no such file'):
    open_source(f'tar:{tmp_path / "none.tar"}', 'train')
  with pytest.raises(UserError, match=f'use tar:{tmp_path / "x.tar"}'):
    open_source(f'folder:{tmp_path / "x.tar"}', 'train')


def test_a_damaged_header_or_a_joined_archive_does_not_lose_examples_silently(folder, tmp_path):
  content = (folder / 'val-0.tar').read_bytes()
  with tarfile.open(folder / 'val-0.tar') as archive:
    third, end = archive.getmembers()[2].offset, archive.offset
  damaged = content[:third] + b'?' + content[third + 1 :]
  for name, data in {
    'damaged header': damaged,
    'a damaged header,': content[: third + 100],
    'data after the end': content + content,
  }.items():
    (tmp_path / 'x.tar').write_bytes(data)
    with pytest.raises(UserError, match=name):
      open_source(f'tar:{tmp_path / "x.tar"}', 'train')
  for data in (content[:end], content + bytes(5000)):  # Without an end mark; with more zeros.
    (tmp_path / 'x.tar').write_bytes(data)
    assert len(open_source(f'tar:{tmp_path / "x.tar"}', 'train')) == 4


def test_labels_without_an_image_are_counted_and_a_new_kind_of_image_is_indexed(
  tmp_path, images, capsys, monkeypatch
):
  files = {'a.png': images[0], 'a.cls': b'0', 'b.png': images[1], 'b.cls': b'1'}
  files |= {'c.raw': b'', 'c.cls': b'1', 'd.cls': b'1', 'f.RAW': b'', 'f.cls': b'0'}
  write_tar(tmp_path / 'x.tar', files)
  name = f'tar:{tmp_path / "x.tar"}'
  for _ in range(2):
    assert len(open_source(name, 'train')) == 2
  note = f'{name}: passed over 3 files without the extension of an image (2 .raw, 1 .cls)'
  assert capsys.readouterr().err.strip() == note  # Once.
  for module in ('archive_store', 'tar_source'):
    monkeypatch.setattr(f'vit_jax.data.{module}.image_extensions', lambda: ('.png', '.raw'))
  assert contents(open_source(name, 'train'))[2:] == [(b'', (1,)), (b'', (0,))]


def test_text_is_the_name_of_a_class_also_if_it_has_digits(tmp_path, images):
  files = {f'{i}.png': image for i, image in enumerate(images)}
  files |= {f'{i}.txt': (b'10', b'9', b'007\n')[i % 3] for i in range(12)}
  write_tar(tmp_path / 'x.tar', dict(sorted(files.items())))
  source = open_source(f'tar:{tmp_path / "x.tar"}', 'train')
  assert source.label_names == ('007', '10', '9')
  for i, name in enumerate(sorted(map(str, range(12)))):
    assert source[i][1] == ((1, 2, 0)[int(name) % 3],)


@pytest.mark.parametrize('name', ['more.tar.gz', 'more.tgz', 'more.tar.zst'])
def test_a_compressed_archive_beside_others_is_an_error(name, folder):
  (folder / name).write_bytes(b'')
  with pytest.raises(UserError, match=f'{name} is compressed'):
    open_source(f'tar:{folder}', 'train')


def test_a_list_of_class_names_that_is_not_utf_8_is_an_error(tmp_path, images):
  files = {}
  for i, image in enumerate(images):
    files |= {f'{i}.png': image, f'{i}.cls': b'%d' % (i % 2)}
  write_tar(tmp_path / 'x.tar', files)
  (tmp_path / 'labels.txt').write_bytes(b'caf\xe9\nbar\n')
  with pytest.raises(UserError, match=r'labels\.txt is not UTF-8'):
    open_source(f'tar:{tmp_path / "x.tar"}', 'train')
