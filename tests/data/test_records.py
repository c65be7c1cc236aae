"""Packed data gives the batches of its source, and names the shard and record of a bad image."""

import contextlib
import gc
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.config import DataConfig
from vit_jax.data import shards
from vit_jax.data.decode import BadImageError
from vit_jax.data.loader import diagnose_bad_example, eval_batches, train_batches
from vit_jax.data.pack import PackOptions, pack_source
from vit_jax.data.records import read_manifest
from vit_jax.data.sources import kind_of_path, open_source, open_unlabelled
from vit_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
  """Return a folder of photos of three classes, some of them stored sideways."""
  rng = np.random.default_rng(0)
  for i in range(18):
    path = tmp_path / 'photos' / ('val' if i < 6 else 'train') / 'abc'[i % 3] / f'{i}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6 if i % 2 else 1
    pixels = rng.integers(0, 256, (9 + i, 31, 3), np.uint8)
    Image.fromarray(pixels).resize((93, 40)).save(path, exif=exif, quality=80)
  return tmp_path / 'photos'


@pytest.fixture
def sources(photos, numbered, tmp_path):
  """Return {kind: (name, directory of TFDS, training split, evaluation split)}."""
  lines = [f'{path},{path.parent.name};{path.stem[0]}\n' for path in sorted(photos.rglob('*.jpg'))]
  (tmp_path / 'labels.csv').write_text('path,labels\n' + ''.join(lines), encoding='utf-8')
  return {
    'folder': (f'folder:{photos}', '', 'train', 'val'),
    'csv': (f'csv:{tmp_path / "labels.csv"}', '', 'train', 'test'),
    'builtin': ('builtin:digits', '', 'train', 'test'),
    'tfds': ('tfds:numbered', str(numbered), 'train', 'validation'),
  }


def both_batches(train, evaluation):
  """Return two training batches and all evaluation batches."""
  data = DataConfig(batch=8, size=(16, 16), crop_area=(0.3, 1.0), threads=2, bad_images='skip')
  stream = train_batches(train, data, seed=3, start=2, host=0, hosts=1)
  out = [next(stream), next(stream), *eval_batches(evaluation, data, host=0, hosts=1)]
  stream.close()
  return out


def assert_equal_batches(ones, others):
  assert len(ones) == len(others) > 2
  for one, other in zip(ones, others, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      assert one[key].dtype == other[key].dtype
      np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize('kind', ['folder', 'csv', 'builtin', 'tfds'])
@pytest.mark.parametrize('part', ['', '/rest:30%'])
def test_batches_are_those_of_the_source(kind, part, sources, tmp_path):
  name, dir, train, evaluation = sources[kind]
  pack_source(name, tmp_path / 'out', PackOptions(shards=3), dir=dir)
  splits = f'{train}[:50%]' if kind == 'builtin' else train + part, evaluation
  packed = [open_source(f'records:{tmp_path / "out"}', split) for split in splits]
  original = [open_source(name, split, dir=dir) for split in splits]
  assert packed[0].label_names == original[0].label_names
  assert (packed[0].kind, packed[0].max_labels) == (kind, original[0].max_labels)
  assert packed[0].is_user_file(0) == original[0].is_user_file(0)
  counts = [source.class_counts() for source in (packed[0], original[0])]
  assert np.array_equal(*counts) if counts[1] is not None else counts[0] is None
  assert_equal_batches(both_batches(*packed), both_batches(*original))


def test_a_part_of_a_split_may_be_packed_as_a_split(photos, tmp_path):
  name, out = f'folder:{photos}', tmp_path / 'out'
  pack_source(name, out, PackOptions(splits=('val', 'train=train/rest:40%')))
  assert read_manifest(out).splits.keys() == {'val', 'train'}
  packed, original = open_source(f'records:{out}', 'train'), open_source(name, 'train/rest:40%')
  assert [packed[i][:2] for i in range(len(packed))] == [
    original[i][:2] for i in range(len(original))
  ]
  assert len(packed) < len(open_source(name, 'train'))
  with pytest.raises(UserError, match='train.*twice'):
    pack_source(name, tmp_path / 'other', PackOptions(splits=('train', 'train=val')))
  with pytest.raises(UserError, match='NAME=SPLIT'):
    pack_source(name, tmp_path / 'other', PackOptions(splits=('train[:3]',)))


def test_the_name_of_an_example_has_its_shard_record_and_file(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=2))
  source = open_source(f'records:{tmp_path / "out"}', 'train')
  assert source[7][2] == (
    f'records:{tmp_path / "out"} train-00001-of-00002.array_record #1 (train/b/7.jpg)'
  )


def test_an_unpickled_source_is_small_and_gives_the_same_examples(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=2))
  source = open_source(f'records:{tmp_path / "out"}', 'train')
  before, packed = source[9], pickle.dumps(source)
  assert len(packed) < 8192
  assert pickle.loads(packed)[9] == before


def test_an_undecodable_image_is_the_same_bad_image(photos, tmp_path):
  (photos / 'train' / 'b' / '13.jpg').write_bytes(b'no image')
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=2))
  names = f'folder:{photos}', f'records:{tmp_path / "out"}'
  original, packed = ([open_source(name, split) for split in ('train', 'val')] for name in names)
  assert_equal_batches(both_batches(*original), both_batches(*packed))
  bad = next(i for i in range(12) if original[0][i][0] == b'no image')
  (name, reason), (_, expected) = (
    diagnose_bad_example(source[0], bad, 10_000) for source in (packed, original)
  )
  assert reason == expected
  assert re.search(r'train-0000\d-of-00002.array_record #\d \(train/b/13.jpg\)', name)


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    (lambda values: values | {'format': 'other'}, 'does not describe records'),
    (lambda values: values | {'version': 2}, 'version 2'),
    (lambda values: values | {'splits': {}}, 'not valid'),
    (lambda values: values | {'extra': 1}, 'not valid'),
    (lambda values: values | {'label_names': [1, 2]}, 'not valid'),
    (lambda values: {'format': values['format'], 'version': 1}, 'not valid'),
    (lambda values: json.loads(json.dumps(values).replace('train-000', '../train-')), 'not valid'),
    (lambda values: json.loads(json.dumps(values).replace('train-labels.npy', '..')), 'not valid'),
    (lambda values: json.loads(json.dumps(values).replace('"examples": 6', '"examples": "6"')),
     'not valid'),
  ],
)  # fmt: skip
def test_a_wrong_manifest_is_a_one_line_error(change, problem, photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=2))
  path = tmp_path / 'out' / 'manifest.json'
  path.write_text(json.dumps(change(json.loads(path.read_text('utf-8')))), encoding='utf-8')
  with pytest.raises(UserError, match=problem) as caught:
    open_source(f'records:{tmp_path / "out"}', 'train')
  assert '\n' not in str(caught.value) and 'manifest.json' in str(caught.value)


def test_a_missing_or_shorter_shard_is_an_error_when_its_split_is_opened(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=2))
  shard = tmp_path / 'out' / 'train-00001-of-00002.array_record'
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(UserError, match=f'{shard.name} has .* bytes'):
    open_source(f'records:{tmp_path / "out"}', 'train')
  shard.unlink()
  with pytest.raises(UserError, match=f'{shard.name} is missing'):
    open_source(f'records:{tmp_path / "out"}', 'train')
  assert len(open_source(f'records:{tmp_path / "out"}', 'val')) == 6


def test_a_flipped_bit_is_a_bad_record_but_never_another_image(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=1))
  name = f'records:{tmp_path / "out"}'
  source = open_source(name, 'train')
  expected = [source[i] for i in range(12)]
  shard = tmp_path / 'out' / 'train-00000-of-00001.array_record'
  data, rng, bad = shard.read_bytes(), np.random.default_rng(0), 0
  written = np.flatnonzero(np.frombuffer(data, np.uint8))  # Most of a small file is padding.
  for at, bit in zip(rng.choice(written, 60), rng.integers(0, 8, 60), strict=True):
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    source = open_source(name, 'train')
    for i in range(12):
      try:
        assert source[i] == expected[i]
      except BadImageError as error:
        assert 'the record is damaged' in str(error) and shard.name in str(error)
        bad += 1
  assert bad > 30


def test_images_without_labels_are_packed_for_a_teacher(photos, tmp_path):
  pack_source(f'images:{photos}', tmp_path / 'out', PackOptions())
  packed, original = (
    open_unlabelled(name, 'train') for name in (f'records:{tmp_path / "out"}', f'images:{photos}')
  )
  assert [packed[i][:2] for i in range(18)] == [original[i][:2] for i in range(18)]
  assert packed.is_user_file(0)
  with pytest.raises(UserError, match='unlabelled'):
    open_source(f'records:{tmp_path / "out"}', 'train')


def test_a_directory_without_a_manifest_says_what_is_expected(tmp_path):
  with pytest.raises(UserError, match='data pack'):
    open_source(f'records:{tmp_path}', 'train')
  (tmp_path / '.packing').mkdir()
  with pytest.raises(UserError, match='not packed to the end'):
    open_source(f'records:{tmp_path}', 'train')


def test_few_shards_are_open_however_many_there_are(photos, tmp_path, monkeypatch):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=6))
  monkeypatch.setattr(shards, 'count_open_shards', lambda: 4)
  sources = [open_source(f'records:{tmp_path / "out"}', split) for split in ('train', 'val') * 2]
  expected = [[source[i] for i in range(len(source))] for source in sources]
  for i in reversed(range(6)):
    assert [source[i] for source in sources] == [examples[i] for examples in expected]
    assert 0 < count_open_shards() <= 4
  del sources
  gc.collect()
  assert not count_open_shards()


def count_open_shards() -> int:
  """Return how many descriptors of this process are shards."""
  count = 0
  for path in Path('/proc/self/fd').iterdir():
    with contextlib.suppress(FileNotFoundError):  # That of the listing.
      count += path.readlink().suffix == '.array_record'
  return count


def test_a_photo_folder_with_a_manifest_of_its_own_is_not_packed(photos, tmp_path):
  (photos / 'manifest.json').write_text('{"name": "my app"}', encoding='utf-8')
  assert kind_of_path(photos) == 'folder'
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions())
  assert kind_of_path(tmp_path / 'out') == 'records'
