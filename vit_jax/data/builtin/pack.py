"""Packs the data that the package brings: python vit_jax/data/builtin/pack.py

Needs scikit-learn and Debian's dataset-fashion-mnist. Each file holds {train,test}_images uint8 [n, h, w] and
{train,test}_labels uint8 [n], in the order of the original.

  fashion_mnist.npz   28x28: the first 30,000 of the 60,000 training images, and all 10,000 test images
  digits.npz          8x8, 0..16 stretched to 0..255: `test` is 50 of each class, evenly spaced over the 1,797 images
"""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FASHION_MNIST_DIR = Path('/usr/share/datasets/fashion-mnist')
FASHION_MNIST_TRAIN_EXAMPLES = 30_000
DIGITS_TEST_PER_CLASS = 50  # Digits held out of each class.


def read_idx(path: Path) -> np.ndarray:
  """A gzipped IDX file of bytes: two zeros, the type, the number of axes, the length of each (big-endian), the data."""
  data = gzip.decompress(path.read_bytes())
  shape = np.frombuffer(data, '>u4', count=data[3], offset=4)
  return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def load_fashion_mnist() -> dict[str, np.ndarray]:
  read = lambda name: read_idx(FASHION_MNIST_DIR / f'{name}-ubyte.gz')
  return {
    'train_images': read('train-images-idx3')[:FASHION_MNIST_TRAIN_EXAMPLES],
    'train_labels': read('train-labels-idx1')[:FASHION_MNIST_TRAIN_EXAMPLES],
    'test_images': read('t10k-images-idx3'),
    'test_labels': read('t10k-labels-idx1'),
  }


def load_digits_split() -> dict[str, np.ndarray]:
  data = load_digits()
  images = np.round(data.images * (255 / 16)).astype(np.uint8)
  labels = data.target.astype(np.uint8)
  held_out = np.zeros(len(labels), bool)
  for label in range(10):
    members = np.flatnonzero(labels == label)
    held_out[
      members[np.linspace(0, len(members) - 1, DIGITS_TEST_PER_CLASS).round().astype(int)]
    ] = True
  train, test = ~held_out, held_out
  return {
    'train_images': images[train],
    'train_labels': labels[train],
    'test_images': images[test],
    'test_labels': labels[test],
  }


def write_lzma_npz(path: Path, arrays: dict[str, np.ndarray]):
  """An .npz compressed with LZMA, which np.load reads like any other: 14 % smaller than np.savez_compressed's."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_LZMA) as file:
    for name, array in arrays.items():
      buffer = io.BytesIO()
      np.lib.format.write_array(buffer, array, allow_pickle=False)
      file.writestr(
        zipfile.ZipInfo(f'{name}.npy'), buffer.getvalue(), zipfile.ZIP_LZMA
      )  # ZipInfo: no time of day.


if __name__ == '__main__':
  for name, arrays in {
    'fashion_mnist': load_fashion_mnist(),
    'digits': load_digits_split(),
  }.items():
    write_lzma_npz(Path(__file__).parent / f'{name}.npz', arrays)
