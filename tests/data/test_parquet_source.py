"""Parquet tables in the layout of the Hugging Face hub."""

import concurrent.futures
import json
import pickle

import numpy as np
import pytest

from vit_jax.data import parquet_source
from vit_jax.data.decode import BadImageError
from vit_jax.data.pack import PackOptions, pack_source
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.errors import UserError

pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

CLASS_LABEL = {'names': ['cat', 'dog', 'emu'], '_type': 'ClassLabel'}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Keep indices in a directory of the test."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def images(png) -> list[bytes]:
  """Return ten images. The pixels of image i are i."""
  return [png(np.full((6, 7, 3), i, np.uint8)) for i in range(10)]


def write_table(path, columns: dict, *, label=None, rows=3):
  """Write a table with the metadata of `datasets` and row groups of `rows` rows."""
  table = pyarrow.table(columns)
  if label:
    features = {'image': {'_type': 'Image'}, 'label': label}
    text = json.dumps({'info': {'features': features}})
    table = table.replace_schema_metadata({b'huggingface': text.encode()})
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(table, path, row_group_size=rows)


@pytest.fixture
def folder(tmp_path, images):
  """Return a folder of three tables: ten rows of `train`, two of `test`."""
  structs = [{'bytes': image, 'path': f'{i}.png'} for i, image in enumerate(images)]
  for name, rows in {
    'train-00000-of-00002': range(7), 'train-00001-of-00002': range(7, 10),
    'test-00000-of-00001': range(2),
  }.items():  # fmt: skip
    columns = {'image': [structs[i] for i in rows], 'label': [i % 3 for i in rows]}
    write_table(tmp_path / 'set' / 'data' / f'{name}.parquet', columns, label=CLASS_LABEL)
  return tmp_path / 'set'


def test_rows_are_read_at_random_with_the_class_names_of_the_schema(folder, images):
  source = open_source(f'parquet:{folder}', 'train')
  assert source.label_names == ('cat', 'dog', 'emu') and source.is_user_file(0)
  for i in (9, 0, 5, 8, 2, 7, 6, 1, 3, 4):
    file, row = divmod(i, 7)
    path = folder / 'data' / f'train-0000{file}-of-00002.parquet'
    assert source[i] == (images[i], (i % 3,), f'{path} #{row} {i}.png')
  assert open_source(f'parquet:{folder}', '').split == 'test'


def test_threads_and_unpickled_sources_read_the_same_rows(folder, images):
  source = pickle.loads(pickle.dumps(open_source(f'parquet:{folder}', 'train')))
  order = np.random.default_rng(0).integers(0, 10, 200).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    found = [image for image, _, _ in threads.map(source.__getitem__, order)]
  assert found == [images[i] for i in order]


def test_columns_of_bytes_names_and_lists_are_read(tmp_path, images):
  write_table(tmp_path / 'a.parquet', {'img': images[:3], 'label': ['dog', 'cat', 'dog']})
  source = open_source(f'parquet:{tmp_path / "a.parquet"}', 'train')
  assert [source[i][:2] for i in range(3)] == [
    (images[0], (1,)),
    (images[1], (0,)),
    (images[2], (1,)),
  ]
  assert source.label_names == ('cat', 'dog')
  write_table(tmp_path / 'b.parquet', {'image': images[:3], 'labels': [[2, 0], [], [1]]})
  source = open_source(f'parquet:{tmp_path / "b.parquet"}', 'train')
  assert [source[i][1] for i in range(3)] == [(2, 0), (), (1,)]
  assert (source.label_names, source.max_labels) == (('0', '1', '2'), 2)
  write_table(
    tmp_path / 'c.parquet', {'image': images[:3], 'label': [0, None, -1]}, label=CLASS_LABEL
  )
  source = open_source(f'parquet:{tmp_path / "c.parquet"}', 'train')
  assert [source[i][1] for i in range(3)] == [(0,), (), ()]


def test_a_packed_table_has_the_same_examples(folder, tmp_path):
  pack_source(f'parquet:{folder}', tmp_path / 'out', PackOptions(shards=2))
  for split in ('train', 'test', 'train/rest:20%'):
    one, other = (
      open_source(name, split) for name in (f'parquet:{folder}', f'records:{tmp_path / "out"}')
    )
    assert one.label_names == other.label_names and len(one) == len(other)
    assert [one[i][:2] for i in range(len(one))] == [other[i][:2] for i in range(len(one))]


def test_labels_are_not_needed_for_a_teacher(tmp_path, images):
  write_table(tmp_path / 'a.parquet', {'image': images})
  source = open_unlabelled(f'parquet:{tmp_path / "a.parquet"}', 'train')
  assert [source[i][:2] for i in range(10)] == [(image, ()) for image in images]
  with pytest.raises(UserError, match='no column label'):
    open_source(f'parquet:{tmp_path / "a.parquet"}', 'train')


def test_a_table_of_paths_has_bad_images(tmp_path):
  structs = [{'bytes': None, 'path': f'{i}.png'} for i in range(3)]
  write_table(tmp_path / 'a.parquet', {'image': structs, 'label': [0, 1, 0]})
  source = open_source(f'parquet:{tmp_path / "a.parquet"}', 'train')
  with pytest.raises(BadImageError, match='#1 1.png: .*no bytes'):
    source[1]


def test_a_damaged_file_is_an_error(tmp_path):
  (tmp_path / 'a.parquet').write_bytes(b'PAR1 is how it begins')
  with pytest.raises(UserError, match='a.parquet is not a parquet file'):
    open_source(f'parquet:{tmp_path / "a.parquet"}', 'train')


def test_without_pyarrow_the_error_says_what_to_install(folder, monkeypatch):
  from importlib import util

  find_spec = util.find_spec
  monkeypatch.setattr(
    util, 'find_spec', lambda name: (name != 'pyarrow' and find_spec(name)) or None
  )
  with pytest.raises(UserError, match=r"pip install 'vit-jax\[parquet\]'"):
    open_source(f'parquet:{folder}', 'train')


@pytest.mark.parametrize(
  ('columns', 'problem'),
  [
    ({'image': [b'', b''], 'label': [0, 5_000_000]}, 'row 1.*less than 1,000,000.*got 5000000'),
    ({'image': [b'', b''], 'label': [0, 1.5]}, 'row 0.*0.0 is not a label'),
    ({'image': ['a.png', 'b.png'], 'label': [0, 1]}, 'image is string; expected bytes'),
    ({'image': [{'path': 'a', 'data': b''}] * 2, 'label': [0, 1]}, 'expected bytes, or structs'),
  ],
)
def test_a_column_of_another_kind_is_a_one_line_error(columns, problem, tmp_path):
  write_table(tmp_path / 'a.parquet', columns)
  with pytest.raises(UserError, match=problem) as caught:
    open_source(f'parquet:{tmp_path / "a.parquet"}', 'train')
  assert '\n' not in str(caught.value)


def test_a_row_group_that_is_too_large_for_an_array_is_an_error(folder, monkeypatch):
  monkeypatch.setattr(parquet_source, 'MAX_ROW_GROUP_BYTES', 100)
  with pytest.raises(UserError, match='smaller row groups'):
    open_source(f'parquet:{folder}', 'train')
