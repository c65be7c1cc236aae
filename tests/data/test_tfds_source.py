"""TFDS datasets read without TensorFlow."""

import collections
import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.array_store import BUILTIN_LABEL_NAMES
from vit_jax.data.decode import BadImageError
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
DEBIAN = Path('/usr/share/datasets/fashion-mnist')


@pytest.mark.skipif(not DEBIAN.is_dir(), reason='needs the Debian package dataset-fashion-mnist')
def test_fashion_mnist_written_as_tfds_equals_the_builtin_one_without_tensorflow(
  tmp_path, write_tfds, png
):
  count = 1000
  splits = {}
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    pixels = gzip.decompress((DEBIAN / f'{prefix}-images-idx3-ubyte.gz').read_bytes())[16:]
    labels = gzip.decompress((DEBIAN / f'{prefix}-labels-idx1-ubyte.gz').read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[:count]
    splits[split] = [
      {'image': png(image), 'label': label} for image, label in zip(images, labels, strict=False)
    ]
  features = {
    'image': tfds.features.Image(shape=(28, 28, 1)),
    'label': tfds.features.ClassLabel(names=BUILTIN_LABEL_NAMES['fashion_mnist']),
  }
  write_tfds('fashion_mnist', tmp_path, features, splits)
  code = f"""
import sys
class NoTensorFlow:
  def __init__(self, finder):
    self.finder = finder
  def find_spec(self, name, *args):
    return None if name.partition('.')[0] == 'tensorflow' else self.finder.find_spec(name, *args)
sys.meta_path = [NoTensorFlow(finder) for finder in sys.meta_path]
from vit_jax.config import DataConfig
from vit_jax.data.decode import decode_image
from vit_jax.data.loader import train_batches
from vit_jax.data.sources import open_source
for split in ('train[:{count}]', 'test[:{count}]'):
  ours = open_source('builtin:fashion_mnist', split)
  theirs = open_source('tfds:fashion_mnist', split, dir={str(tmp_path)!r})
  assert ours.label_names == theirs.label_names and len(ours) == len(theirs) == {count}
  for i in range({count}):
    a, b = ours[i], theirs[i]
    assert a[1] == b[1]
    one, other = (decode_image(x[0], name=x[2], max_pixels=1000) for x in (a, b))
    assert one.shape == (28, 28, 3) and (one == other).all()
  config = DataConfig(batch=64, size=(32, 32))
  batches = [train_batches(source, config, seed=0, start=17, host=0, hosts=1) for source in (ours, theirs)]
  for a, b in (next(zip(*batches)) for _ in range(2)):
    assert all((a[key] == b[key]).all() for key in ('image', 'label', 'mask'))
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True, cwd=ROOT)


def test_a_dataset_may_have_several_labels_per_image(tmp_path, write_tfds, png):
  features = {
    'photo': tfds.features.Image(),
    'labels': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=7)),
  }
  examples = [
    {'photo': png(np.zeros((2, 2), np.uint8)), 'labels': labels} for labels in ([3], [], [1, 6, 2])
  ]
  write_tfds('several', tmp_path, features, {'train': examples})
  source = open_source('tfds:several', 'train', dir=str(tmp_path))
  assert [source[i][1] for i in range(3)] == [(3,), (), (1, 6, 2)]
  assert (source.max_labels, source.label_names) == (3, tuple('0123456'))
  assert (
    open_source('tfds:several', 'train[:2]', dir=str(tmp_path))[0][2] == 'tfds:several train #0'
  )


def test_a_missing_file_or_missing_labels_are_an_error(numbered, write_tfds, png):
  next(numbered.glob('numbered/1.2.3/*train*')).unlink()
  with pytest.raises(UserError, match=r"numbered-train\.array_record-.*'train'"):
    open_source('tfds:numbered', 'validation', dir=str(numbered))
  image = tfds.features.Image()
  write_tfds(
    'bare', numbered, {'image': image}, {'train': [{'image': png(np.zeros((2, 2), np.uint8))}]}
  )
  with pytest.raises(UserError, match='class label .*image'):
    open_source('tfds:bare', 'train', dir=str(numbered))


def open_damaged(dir, change):
  """Change the bytes of the training file of tfds:numbered and open it."""
  (path,) = dir.glob('numbered/*/*train*array_record*')
  data = bytearray(path.read_bytes())
  change(data)
  path.write_bytes(data)
  return open_source('tfds:numbered', 'train', dir=str(dir))


def test_a_flipped_bit_is_a_bad_record_or_an_error_but_never_another_record(numbered):
  intact = open_source('tfds:numbered', 'train', dir=str(numbered))
  expected = [intact[i] for i in range(10)]
  (path,) = numbered.glob('numbered/*/*train*array_record*')
  data, rng, seen = path.read_bytes(), np.random.default_rng(0), collections.Counter()
  written = np.flatnonzero(np.frombuffer(data, np.uint8))  # Most of a small file is padding.
  for at, bit in zip(rng.choice(written, 150), rng.integers(0, 8, 150), strict=True):
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    try:
      source = open_source('tfds:numbered', 'train', dir=str(numbered))
    except UserError as error:
      assert 'prepare it again' in str(error)
      seen['refused'] += 1
      continue
    for i in range(10):
      try:
        assert source[i] == expected[i]
      except BadImageError as error:
        assert str(error).startswith(f'tfds:numbered train #{i}: the record is damaged')
        seen['bad'] += 1
  assert seen['refused'] and seen['bad'], seen


def test_a_truncated_file_is_an_error_at_the_start(numbered):
  with pytest.raises(
    UserError,
    match=r'train.* 10; prepare it again',
  ):
    open_damaged(numbered, lambda data: data.__delitem__(slice(len(data) // 2, None)))


def test_a_wrong_number_of_records_is_an_error_at_the_start(numbered):
  (info,) = numbered.glob('numbered/*/dataset_info.json')
  for listed in ('9', '11'):
    info.write_text(
      re.sub(r'"10"', f'"{listed}"', info.read_text(encoding='utf-8')), encoding='utf-8'
    )
    with pytest.raises(UserError, match=rf'train.* 10 records, .* {listed}; prepare it again'):
      open_source('tfds:numbered', 'train', dir=str(numbered))
    info.write_text(
      re.sub(rf'"{listed}"', '"10"', info.read_text(encoding='utf-8')), encoding='utf-8'
    )


def test_a_record_without_an_image_or_with_an_invalid_label_is_bad(tmp_path, write_tfds, png):
  features = {
    'image': tfds.features.Image(),
    'label': tfds.features.ClassLabel(names=['a', 'b', 'c']),
  }
  write_tfds(
    'many',
    tmp_path,
    features,
    {'train': [{'image': png(np.zeros((2, 3, 3), np.uint8)), 'label': 2}]},
  )
  source = open_source('tfds:many', 'train', dir=str(tmp_path))
  source._store.label_names = ('a', 'b')
  with pytest.raises(BadImageError, match=r'tfds:many train #0: label 2 .* 2 classes'):
    source[0]
  source._store._records._image_feature = 'picture'
  with pytest.raises(BadImageError, match=r'tfds:many train #0: .*damaged'):
    source[0]


def test_the_file_name_is_part_of_the_name_of_an_example(tmp_path, write_tfds, png):
  """The ReaL labels are found by file name."""
  features = {
    'image': tfds.features.Image(),
    'label': tfds.features.ClassLabel(names=['a', 'b']),
    'file_name': tfds.features.Text(),
  }
  example = {
    'image': png(np.zeros((2, 2, 3), np.uint8)),
    'label': 1,
    'file_name': 'ILSVRC2012_val_00000007.JPEG',
  }
  write_tfds('named', tmp_path, features, {'validation': [example]})
  _, labels, name = open_source('tfds:named', '', dir=str(tmp_path))[0]
  assert (labels, name) == ((1,), 'tfds:named validation #0 ILSVRC2012_val_00000007.JPEG')
