"""`data verify` finds damaged files, and `data pack` prints what it wrote."""

import cv2
import numpy as np
import pytest

from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import FolderStore
from vit_jax.data.pack import PackOptions, pack_source


def state(path):
  """Return what a write changes. Reading a file changes the time of the last access."""
  status = path.stat()
  return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture
def packed(tmp_path, png):
  """Return packed data of three shards of `train` and two of `test`."""
  for i in range(21):
    path = tmp_path / 'photos' / 'ab'[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(np.full((5, 5, 3), i, np.uint8)))
  pack_source(f'folder:{tmp_path / "photos"}', tmp_path / 'out', PackOptions(shards=3))
  return tmp_path / 'out'


def test_packing_prints_the_splits_and_verifying_finds_them_good(packed, typed, tmp_path):
  code, out, _ = typed('data', 'pack', f'folder:{tmp_path / "photos"}', f'--to={packed}')
  assert code == 0
  assert out.splitlines()[-1] == f'read them as records:{packed}'
  assert out.startswith('train: 19 examples in 3 shards, ')
  changed = lambda: {path: path.stat().st_mtime_ns for path in packed.iterdir()}
  before = changed()
  code, out, _ = typed('data', 'verify', str(packed))
  lines = [line.split() for line in out.splitlines()]
  assert code == 0 and {line[1] for line in lines} == {'good'}
  assert {line[0] for line in lines} == {path.name for path in packed.iterdir()}
  assert changed() == before


@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove', 'swap'])
def test_a_damaged_file_is_named(damage, packed, typed):
  shard, other = (packed / f'train-0000{i}-of-00003.array_record' for i in (1, 0))
  data = shard.read_bytes()
  if damage == 'flip':
    shard.write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])
  elif damage == 'cut':
    shard.write_bytes(data[:-1])
  elif damage == 'remove':
    shard.unlink()
  else:
    shard.write_bytes(other.read_bytes())
  code, out, _ = typed('data', 'verify', str(packed))
  assert code == 1
  assert [line.split()[0] for line in out.splitlines() if 'DAMAGED' in line] == [shard.name]


def test_an_image_that_does_not_decode_is_found_but_is_no_damage(tmp_path, typed):
  for name in 'ab':
    (tmp_path / 'photos' / name).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'photos' / name / '0.png'), np.zeros((3, 3), np.uint8))
    (tmp_path / 'photos' / name / '1.jpg').write_bytes(b'broken')
  pack_source(f'folder:{tmp_path / "photos"}', tmp_path / 'out', PackOptions())
  code, out, _ = typed('data', 'verify', str(tmp_path / 'out'))
  assert code == 0 and 'DAMAGED' not in out
  assert {line.split()[0] for line in out.splitlines() if '1.jpg' in line} == {'bad'}


@pytest.mark.parametrize('value', ['512', '0,95', '512,101', 'x,y'])
def test_a_wrong_reencoding_is_refused(value, typed, tmp_path):
  code, _, error = typed(
    'data', 'pack', 'builtin:digits', f'--to={tmp_path / "o"}', f'--reencode={value}'
  )
  assert code == 2 and 'SHORT_SIDE,QUALITY' in error


def test_packing_prints_how_many_images_could_not_be_read(typed, tmp_path, png, monkeypatch):
  for name in 'ab':
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(3):
      (tmp_path / 'photos' / name / f'{i}.png').write_bytes(png(np.zeros((3, 3, 3), np.uint8)))

  def read_none(store, split, i):
    raise BadImageError('x.png', 'Input/output error')

  monkeypatch.setattr(FolderStore, 'read_example', read_none)
  arguments = [f'--to={tmp_path / "out"}', '--bad_images=keep', '--split=train=all']
  code, out, _ = typed('data', 'pack', f'folder:{tmp_path / "photos"}', *arguments)
  assert code == 0 and 'train: 6 images could not be read' in out
