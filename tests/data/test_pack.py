"""Packing continues where it was killed, gives the same files for any threads, and can re-encode."""

import fcntl
import hashlib
import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import FolderStore
from vit_jax.data.pack import PackOptions, pack_source, shorten_name
from vit_jax.data.records import read_manifest
from vit_jax.data.reencode import reencode_image
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def state(path):
  """Return what a write changes. Reading a file changes the time of the last access."""
  status = path.stat()
  return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture
def photos(tmp_path):
  """Return a folder of 40 smooth photos of two classes, without splits."""
  rng = np.random.default_rng(0)
  for i in range(40):
    path = tmp_path / 'photos' / 'ab'[i % 2] / f'{i:02d}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    small.resize((90, 60), Image.Resampling.BICUBIC).save(path, quality=90)
  return tmp_path / 'photos'


def checksums(folder):
  """Return {name: SHA-256} of the files of packed data."""
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())
  }


class Killed(BaseException):
  """Ends packing as nothing else does."""


def test_the_manifest_has_the_size_and_sha256_of_each_file(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions(shards=3))
  listed = read_manifest(tmp_path / 'out')
  files = [file for split in listed.splits.values() for file in (*split.shards, split.labels)]
  expected = checksums(tmp_path / 'out')
  del expected['manifest.json']
  assert {file.file: file.sha256 for file in files} == expected
  assert all((tmp_path / 'out' / file.file).stat().st_size == file.bytes for file in files)
  assert [shard.examples for shard in listed.splits['train'].shards] == [12, 12, 12]
  assert (listed.source, listed.source_kind) == (f'folder:{photos}', 'folder')


def test_files_do_not_depend_on_threads_nor_on_the_place_of_the_source(photos, tmp_path):
  pack_source(f'folder:{photos}', tmp_path / 'one', PackOptions(shards=3, threads=1))
  photos.rename(tmp_path / 'moved')
  pack_source(f'folder:{tmp_path / "moved"}', tmp_path / 'many', PackOptions(shards=3, threads=7))
  one, many = checksums(tmp_path / 'one'), checksums(tmp_path / 'many')
  assert one.keys() == many.keys() and one.pop('manifest.json') != many.pop('manifest.json')
  assert one == many


@pytest.mark.parametrize('read', [0, 13, 25, 39])
def test_an_ended_packing_continues_with_the_unfinished_shard(read, photos, tmp_path, monkeypatch):
  name, options, out = f'folder:{photos}', PackOptions(shards=4, threads=1), tmp_path / 'out'
  pack_source(name, tmp_path / 'expected', options)
  read_example, count = FolderStore.read_example, iter(range(1000))

  def read_some(*args):
    if next(count) == read + 20:  # The checksums have read 16 of 36 photos, and 4 of 4.
      raise Killed
    return read_example(*args)

  with monkeypatch.context() as patch:
    patch.setattr(FolderStore, 'read_example', read_some)
    with pytest.raises(Killed):
      pack_source(name, out, options)
  with pytest.raises(UserError, match='not packed to the end'):
    open_source(f'records:{out}', 'train')
  finished = {path: state(path) for path in out.glob('t*.array_record')}
  assert len(finished) == {0: 0, 13: 1, 25: 2, 39: 7}[read]
  # What a process that is killed at once leaves behind.
  (out / 'incomplete.test-00003-of-00004.array_record').write_bytes(b'the first half')
  (out / '.packing' / 'test-00003-of-00004.array_record.json').write_text('{}', encoding='utf-8')
  pack_source(name, out, PackOptions(threads=3))  # The number of shards is that of the first.
  assert all(state(path) == before for path, before in finished.items())
  assert checksums(out) == checksums(tmp_path / 'expected')


def test_packing_again_changes_nothing_and_other_options_are_refused(photos, tmp_path):
  name, out = f'folder:{photos}', tmp_path / 'out'
  pack_source(name, out, PackOptions(shards=2))
  before = {path: state(path) for path in out.iterdir()}
  pack_source(name, out, PackOptions(shards=2))
  assert {path: state(path) for path in out.iterdir()} == before
  for options in (
    PackOptions(shards=1), PackOptions(reencode=(32, 90)), PackOptions(splits=('train',)),
  ):  # fmt: skip
    with pytest.raises(UserError, match='--to'):
      pack_source(name, out, options)
  (photos / 'a' / '00.jpg').unlink()
  with pytest.raises(UserError, match='the source has changed'):
    pack_source(name, out, PackOptions())
  assert {path: state(path) for path in out.iterdir()} == before


def test_a_directory_with_other_files_or_another_packing_is_refused(photos, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('', encoding='utf-8')
  with pytest.raises(UserError, match='not empty'):
    pack_source(f'folder:{photos}', tmp_path / 'mine', PackOptions())
  (tmp_path / 'out' / '.packing').mkdir(parents=True)
  with (tmp_path / 'out' / '.packing' / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another process'):
      pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions())
  with pytest.raises(UserError, match='gs://'):
    pack_source(f'folder:{photos}', 'gs://bucket/out', PackOptions())


def test_an_unreadable_file_ends_packing_or_is_kept_as_a_bad_image(photos, tmp_path, monkeypatch):
  read_example = FolderStore.read_example

  def read_some(store, split, i):
    if (split, i) == ('train', 5):
      raise BadImageError('photos/a/x.jpg', 'the file cannot be read (Input/output error)')
    return read_example(store, split, i)

  monkeypatch.setattr(FolderStore, 'read_example', read_some)
  with pytest.raises(UserError, match='x.jpg: the file cannot be read.*--bad_images=keep'):
    pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions())
  options = PackOptions(keep_unreadable=True, shards=2)
  manifest = pack_source(f'folder:{photos}', tmp_path / 'out', options)
  assert manifest == read_manifest(tmp_path / 'out')
  assert [file.unreadable for file in manifest.splits['train'].shards] == [1, 0]
  source = open_source(f'records:{tmp_path / "out"}', 'train')
  assert len(source) == 36 and source[6][1] in ((0,), (1,))
  with pytest.raises(BadImageError, match=r'array_record #5 .*x\.jpg.*Input/output error'):
    source[5]


def test_a_full_disk_is_a_user_error(photos, tmp_path, monkeypatch):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter
  full = lambda path, options: writer('/dev/full', options)
  monkeypatch.setattr(array_record_module, 'ArrayRecordWriter', full)
  with pytest.raises(UserError, match='No space left'):
    pack_source(f'folder:{photos}', tmp_path / 'out', PackOptions())


def test_reencoded_images_are_those_that_pillow_resizes_upright(tmp_path):
  rng = np.random.default_rng(0)
  for i, orientation in enumerate((1, 6, 3, 1)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    path = tmp_path / 'photos' / 'ab'[i % 2] / f'{i}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (121, 80) if i < 3 else (40, 31)
    small.resize(size, Image.Resampling.BICUBIC).save(path, exif=exif, quality=95)
  out = tmp_path / 'out'
  pack_source(f'folder:{tmp_path / "photos"}', out, PackOptions(reencode=(32, 95)))
  assert read_manifest(out).reencode == {
    'short_side': 32, 'quality': 95, 'interpolation': 'pil_bicubic', 'subsampling': '420',
  }  # fmt: skip
  packed, original = (
    open_source(name, 'all') for name in (f'records:{out}', f'folder:{tmp_path / "photos"}')
  )
  for i in range(4):
    data, stored = packed[i][0], original[i][0]
    if '3.jpg' in original[i][2]:
      assert data == stored  # Its short side is not above 32.
      continue
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    w, h = upright.size
    size = (48, 32) if w > h else (32, 48)  # 121 * 32 / 80 is 48.4.
    expected = np.asarray(upright.resize(size, Image.Resampling.BICUBIC), int)
    image = Image.open(io.BytesIO(data))
    assert image.size == size and not image.getexif()
    assert np.abs(np.asarray(image, int) - expected).mean() < 3  # Quality 95 loses little.
  with pytest.raises(UserError, match='not an image file'):
    pack_source('builtin:digits', tmp_path / 'digits', PackOptions(reencode=(32, 95)))


def test_names_lose_the_directory_of_their_source():
  assert shorten_name('/data/photos/train/a.jpg', 'folder:/data/photos') == 'train/a.jpg'
  assert shorten_name('/data/photos/a.jpg', 'csv:/data/photos/labels.csv') == 'a.jpg'
  assert shorten_name('photos/a.jpg', 'folder:photos') == 'a.jpg'
  assert shorten_name('photos/a.jpg', 'folder:./photos') == 'a.jpg'
  assert shorten_name('photos/a.jpg', 'csv:./photos/labels.csv') == 'a.jpg'
  assert shorten_name('tfds:cifar10 train #5', 'tfds:cifar10') == 'tfds:cifar10 train #5'


def test_a_process_killed_at_any_moment_continues_to_the_same_files(photos, tmp_path):
  code = (
    'from pathlib import Path; from vit_jax.data.pack import *; import sys;'
    'print(flush=True);'
    f'pack_source("folder:{photos}", Path(sys.argv[1]), PackOptions(shards=30))'
  )
  pack_source(f'folder:{photos}', tmp_path / 'expected', PackOptions(shards=30))
  for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
    out = tmp_path / f'out-{delay}'
    process = subprocess.Popen([sys.executable, '-c', code, str(out)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(delay)
    process.kill()
    process.communicate()
    finished = {path: state(path) for path in out.glob('t*.array_record')}
    pack_source(f'folder:{photos}', out, PackOptions(shards=30))
    assert all(state(path) == before for path, before in finished.items())
    assert checksums(out) == checksums(tmp_path / 'expected')


@pytest.mark.parametrize('damage', ['remove a shard', 'cut a shard', 'remove the labels'])
def test_packing_again_repairs_a_missing_or_cut_file(damage, photos, tmp_path):
  name, out = f'folder:{photos}', tmp_path / 'out'
  pack_source(name, out, PackOptions(shards=3))
  expected = checksums(out)
  bad = out / ('train-labels.npy' if 'labels' in damage else 'train-00001-of-00003.array_record')
  others = {path: state(path) for path in out.glob('*.array_record') if path != bad}
  if damage == 'cut a shard':
    bad.write_bytes(bad.read_bytes()[:-1])
  else:
    bad.unlink()
  pack_source(name, out, PackOptions())
  assert checksums(out) == expected
  assert all(state(path) == before for path, before in others.items())


def test_a_shard_whose_note_is_lost_is_written_again(photos, tmp_path, monkeypatch):
  name, out = f'folder:{photos}', tmp_path / 'out'
  pack_source(name, tmp_path / 'expected', PackOptions(shards=3))
  with monkeypatch.context() as patch:
    patch.setattr('vit_jax.data.pack.Manifest', None)  # It ends before the manifest.
    with pytest.raises(TypeError):
      pack_source(name, out, PackOptions(shards=3))
  (out / '.packing' / 'train-00001-of-00003.array_record.json').unlink()
  (out / '.packing' / 'train-00002-of-00003.array_record.json').write_text('[', encoding='utf-8')
  pack_source(name, out, PackOptions())
  assert checksums(out) == checksums(tmp_path / 'expected')


def test_an_image_that_changed_is_not_packed_already(photos, tmp_path):
  name, out = f'folder:{photos}', tmp_path / 'out'
  pack_source(name, out, PackOptions(splits=('train=all',)))
  for path in photos.rglob('*.jpg'):
    path.write_bytes(path.read_bytes()[:-1] + b'x')  # The names and sizes stay.
  with pytest.raises(UserError, match='the source has changed'):
    pack_source(name, out, PackOptions(splits=('train=all',)))
  manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
  del manifest['splits']['train']['content']  # As an older program wrote it.
  (out / 'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
  pack_source(name, out, PackOptions(splits=('train=all',)))


def test_an_image_too_long_for_a_jpeg_stays_as_it_is():
  out = io.BytesIO()
  Image.new('RGB', (70_000, 20)).save(out, 'png')
  data = out.getvalue()
  assert reencode_image(data, 'x', 19, 95, user_file=True) is data
  small = reencode_image(data, 'x', 10, 95, user_file=True)
  assert Image.open(io.BytesIO(small)).size == (35_000, 10)
