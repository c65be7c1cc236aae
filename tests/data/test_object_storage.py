"""Packed data behind a URL gives the batches of the directory, also from a server with faults."""

import itertools
import pickle
import threading

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from tests.data.range_server import RangeServer, serving
from vit_jax.config import DataConfig
from vit_jax.data import object_storage
from vit_jax.data.decode import BadImageError
from vit_jax.data.loader import eval_batches, train_batches
from vit_jax.data.object_storage import REQUESTS, ObjectShards
from vit_jax.data.pack import WRITER_OPTIONS, PackOptions, pack_source
from vit_jax.data.record_format import read_chunk_ends, read_footer_position, read_record
from vit_jax.data.records import read_manifest
from vit_jax.data.sources import open_source
from vit_jax.errors import StorageError, UserError
from vit_jax.runtime import files

pytest.importorskip('aiohttp')


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
  """Return the directory of packed photos, 60 of which are in two shards of `train`."""
  root, rng = tmp_path_factory.mktemp('object_storage'), np.random.default_rng(0)
  for i in range(72):
    path = root / 'photos' / ('val' if i < 12 else 'train') / 'abc'[i % 3] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), np.uint8)).save(path)
  pack_source(f'folder:{root / "photos"}', root / 'out', PackOptions(shards=2))
  return root / 'out'


@pytest.fixture(scope='module')
def expected(packed):
  """Return the batches of the directory."""
  return all_batches(f'records:{packed}')


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.01, 0.01, 0.01))


def all_batches(name: str, **settings) -> list[dict[str, np.ndarray]]:
  """Return the batches of two epochs and those of the evaluation."""
  data = DataConfig(batch=16, size=(16, 16), crop_area=(0.3, 1.0), threads=2, **settings)
  stream = train_batches(open_source(name, 'train'), data, seed=3, start=1, host=0, hosts=1)
  out = [next(stream) for _ in range(8)]
  stream.close()
  return out + list(eval_batches(open_source(name, 'val'), data, host=0, hosts=1))


def assert_equal_batches(ones, others):
  for one, other in zip(ones, others, strict=True):
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize(('count', 'largest'), [(1, 9), (1, 200_000), (4000, 40), (60, 150_000)])
def test_records_are_those_that_the_reader_of_arrayrecord_returns(count, largest, tmp_path):
  path, rng = tmp_path / 'shard', np.random.default_rng(count)
  writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
  for size in rng.integers(1, largest, count):
    writer.write(rng.bytes(int(size)))
  writer.close()
  data = path.read_bytes()
  footer = read_footer_position(data[-65536:], len(data))
  ends = read_chunk_ends(data[footer:-65536], footer).tolist()
  reader = ArrayRecordReader(str(path))
  found = [read_record(data[a:b], a) for a, b in itertools.pairwise(ends)]
  assert found == reader.read_all()
  reader.close()


def test_a_cut_record_or_footer_is_an_error(packed):
  data = (packed / 'train-00000-of-00002.array_record').read_bytes()
  footer = read_footer_position(data[-65536:], len(data))
  first, second = read_chunk_ends(data[footer:-65536], footer)[:2].tolist()
  for cut in range(first, second):
    with pytest.raises(ValueError):
      read_record(data[first:cut], first)
  for cut in range(footer, footer + 100):
    with pytest.raises(ValueError):
      read_chunk_ends(data[footer:cut], footer)
  with pytest.raises(ValueError):
    read_footer_position(data[-65536 - 100 : -100], len(data))


@pytest.mark.parametrize('kind', ['http', 'memory', 'file'])
def test_batches_are_those_of_the_directory(kind, packed, expected):
  if kind == 'memory':
    for path in packed.iterdir():
      with fsspec.open(f'memory://bucket/packed/{path.name}', 'wb') as out:
        out.write(path.read_bytes())
    assert_equal_batches(all_batches('records:memory://bucket/packed'), expected)
  elif kind == 'file':
    assert_equal_batches(all_batches(f'records:file://{packed}/'), expected)
  else:
    with serving(RangeServer(packed, latency=0.005)) as url:
      assert_equal_batches(all_batches(f'records:{url}'), expected)


@pytest.mark.parametrize('fault', ['503', 'cut', 'short'])
def test_failed_and_cut_responses_never_give_other_bytes(fault, packed, expected):
  server = RangeServer(packed, fault=lambda number, path: fault if number % 3 == 0 else None)
  with serving(server) as url:
    assert_equal_batches(all_batches(f'records:{url}'), expected)


@pytest.mark.parametrize('fault', ['503', 'cut', 'short', 'whole'])
def test_storage_that_stays_broken_ends_the_run_and_is_no_bad_image(fault, packed):
  server = RangeServer(packed, fault=lambda number, path: fault if '00001' in path else None)
  with serving(server) as url, pytest.raises(StorageError, match='00001'):
    all_batches(f'records:{url}', bad_images='skip')


def test_a_missing_file_or_another_shard_is_an_error(packed, tmp_path):
  with serving(RangeServer(tmp_path)) as url:
    with pytest.raises(UserError, match='manifest.json is missing'):
      open_source(f'records:{url}', 'train')
    for path in packed.iterdir():
      (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / 'train-00000-of-00002.array_record'
    shard.write_bytes((packed / 'val-00000-of-00002.array_record').read_bytes())
    with pytest.raises(UserError, match='train-00000'):
      open_source(f'records:{url}', 'train')[0]
    shard.unlink()
    with pytest.raises(UserError, match='train-00000.* is missing'):
      open_source(f'records:{url}', 'train')[0]


def test_a_damaged_header_is_a_bad_image(packed, tmp_path):
  for path in packed.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  shard = tmp_path / 'train-00000-of-00002.array_record'
  data = bytearray(shard.read_bytes())
  footer = read_footer_position(bytes(data[-65536:]), len(data))
  data[int(read_chunk_ends(bytes(data[footer:-65536]), footer)[5]) + 8] ^= 1
  shard.write_bytes(data)
  with pytest.raises(BadImageError, match='train-00000.* #5'):
    open_source(f'records:file://{tmp_path}', 'train')[5]


def test_read_ahead_is_concurrent_joins_neighbours_and_is_bounded(packed, monkeypatch):
  shard = read_manifest(packed).splits['train'].shards[0]
  server = RangeServer(packed, latency=0.05)
  with serving(server) as url:
    shards = ObjectShards(url)
    shards.read_ahead([(shard, i) for i in range(shard.examples)])
    records = [shards.read_record(shard, i) for i in range(shard.examples)]
    assert len(server.requests) == 2  # The footer and all records.
    size, limit = max(map(len, records)), 10 * max(map(len, records))
    monkeypatch.setattr(object_storage, 'MAX_RANGE_BYTES', 0)
    monkeypatch.setattr(object_storage, 'MEMORY_BYTES', limit)
    shards = ObjectShards(url)
    for _ in range(3):
      shards.read_ahead([(shard, i) for i in range(shard.examples)])
      assert shards._bytes <= limit + size
    assert [shards.read_record(shard, i) for i in range(shard.examples)] == records
    assert shards._bytes <= limit + size and len(shards._fetched) < shard.examples
    monkeypatch.undo()
    monkeypatch.setattr(object_storage, 'MAX_RANGE_BYTES', 0)
    shards, server.most_active = ObjectShards(url), 0
    shards.read_ahead([(shard, i) for i in range(shard.examples)])
    assert shards.read_record(shard, shard.examples - 1) == records[-1]
  assert shard.examples // 2 <= server.most_active <= REQUESTS


def test_an_unpickled_source_is_small_and_threads_read_the_same(packed):
  with serving(RangeServer(packed)) as url:
    source = open_source(f'records:{url}', 'train')
    expected = [source[i][:2] for i in range(len(source))]
    data = pickle.dumps(source)
    assert len(data) < 8192
    other, found = pickle.loads(data), {}
    threads = [
      threading.Thread(target=lambda i=i: found.update({i: other[i][:2]}))
      for i in range(len(source))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert [found[i] for i in range(len(source))] == expected


def test_an_unknown_kind_of_url_says_what_to_install():
  with pytest.raises(UserError, match='storage'):
    open_source('records:nowhere://bucket/dir', 'train')
