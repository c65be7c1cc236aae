"""TFDS data sets read without TensorFlow."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.sources import BUILTIN, open_source
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
DEBIAN = Path('/usr/share/datasets/fashion-mnist')


@pytest.mark.skipif(not DEBIAN.is_dir(), reason='needs the Debian package dataset-fashion-mnist')
def test_fashion_mnist_written_as_tfds_equals_the_builtin_one_without_tensorflow(tmp_path, write_tfds, png):
  count = 1000
  splits = {}
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    pixels = gzip.decompress((DEBIAN / f'{prefix}-images-idx3-ubyte.gz').read_bytes())[16:]
    labels = gzip.decompress((DEBIAN / f'{prefix}-labels-idx1-ubyte.gz').read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[:count]
    splits[split] = [{'image': png(image), 'label': label} for image, label in zip(images, labels, strict=False)]
  features = {
    'image': tfds.features.Image(shape=(28, 28, 1)),
    'label': tfds.features.ClassLabel(names=BUILTIN['fashion_mnist']),
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
from vit_jax.data.images import decode
from vit_jax.data.loader import train_batches
from vit_jax.data.sources import open_source
for split in ('train[:{count}]', 'test[:{count}]'):
  ours = open_source('builtin:fashion_mnist', split)
  theirs = open_source('tfds:fashion_mnist', split, dir={str(tmp_path)!r})
  assert ours.label_names == theirs.label_names and len(ours) == len(theirs) == {count}
  for i in range({count}):
    a, b = ours[i], theirs[i]
    assert a[1] == b[1]
    one, other = (decode(x[0], name=x[2], max_pixels=1000) for x in (a, b))
    assert one.shape == (28, 28, 3) and (one == other).all()
  config = DataConfig(batch=64, size=(32, 32))
  batches = [train_batches(source, config, seed=0, start=17, host=0, hosts=1) for source in (ours, theirs)]
  for a, b in (next(zip(*batches)) for _ in range(2)):
    assert all((a[key] == b[key]).all() for key in ('image', 'label', 'mask'))
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True, cwd=ROOT)


def test_a_tfds_data_set_may_have_several_labels_an_image(tmp_path, write_tfds, png):
  features = {
    'photo': tfds.features.Image(),
    'labels': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=7)),
  }
  examples = [{'photo': png(np.zeros((2, 2), np.uint8)), 'labels': labels} for labels in ([3], [], [1, 6, 2])]
  write_tfds('several', tmp_path, features, {'train': examples})
  source = open_source('tfds:several', 'train', dir=str(tmp_path))
  assert [source[i][1] for i in range(3)] == [(3,), (), (1, 6, 2)]
  assert (source.most_labels, source.label_names) == (3, tuple('0123456'))
  assert open_source('tfds:several', 'train[:2]', dir=str(tmp_path))[0][2] == 'tfds:several train #0'


def test_a_tfds_data_set_without_a_file_or_without_labels_says_so(numbered, write_tfds, png):
  next(numbered.glob('numbered/1.2.3/*train*')).unlink()
  with pytest.raises(UserError, match=r"numbered-train\.array_record-.* of its split 'train' is missing"):
    open_source('tfds:numbered', 'validation', dir=str(numbered))
  image = tfds.features.Image()
  write_tfds('bare', numbered, {'image': image}, {'train': [{'image': png(np.zeros((2, 2), np.uint8))}]})
  with pytest.raises(UserError, match='expected one class label in an example, but it has none among image'):
    open_source('tfds:bare', 'train', dir=str(numbered))
