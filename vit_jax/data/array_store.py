"""Sources of images in arrays: the datasets inside the package, and files in the IDX format.

An IDX directory has pairs of files, as MNIST, Fashion-MNIST and EMNIST are published, gzipped or
not:

  train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz
  t10k-images-idx3-ubyte.gz   t10k-labels-idx1-ubyte.gz    the split `test`
  labels.txt                                               a class name per line; optional

Images are grey, uint8 [n, h, w]. Without labels.txt the classes are named by their numbers.
"""

import functools
import gzip
import math
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.class_names import read_class_names
from vit_jax.errors import UserError, did_you_mean

# One decoding thread loads the images, and the others wait. NumPy parses array headers with `ast`,
# whose recursion counter all threads of CPython 3.11 share, so two at a time may fail.
_LOAD_LOCK = threading.Lock()

BUILTIN_LABEL_NAMES = {
  'digits': ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9'),
  'fashion_mnist': (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
    'Ankle boot',
  ),
}  # fmt: skip

IDX_PREFIXES = {'train': 'train', 'test': 't10k'}  # Split -> the first word of its files.
_IDX_UINT8 = 0x08  # The type code of the format for bytes.
_GZIP_MAGIC = b'\x1f\x8b'


class ArrayStore:
  """Images in arrays, with one label each. The images are read when the first is used."""

  def __init__(
    self,
    title: str,
    label_names: tuple[str, ...],
    labels: dict[str, np.ndarray],
    read_images: Callable[[str], np.ndarray],
  ):
    """Make a store of the splits of `labels`, {split: [n]}.

    `read_images` maps a split to its images, uint8 [n, h, w] or [n, h, w, 3]. It can be pickled.
    """
    self.title, self.label_names, self.splits = title, label_names, tuple(labels)
    self._labels, self._read_images, self._images = labels, read_images, {}

  def __getstate__(self) -> dict:
    return self.__dict__ | {'_images': {}}

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    return [len(self._labels[split])]

  def max_labels(self, split: str) -> int:
    """Return the largest number of labels of an example."""
    return 1

  def read_labels(self, split: str) -> np.ndarray:
    """Return the labels [n, 1] of all examples of a split."""
    return self._labels[split].astype(np.int32)[:, None]

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when the list of examples of a split changes."""
    return self._labels[split].tobytes()

  def read_example(self, split: str, i: int) -> tuple[np.ndarray, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    if split not in self._images:
      with _LOAD_LOCK:
        if split not in self._images:  # Another thread may have loaded them during the wait.
          self._images[split] = self._read_images(split)
    return self._images[split][i], (int(self._labels[split][i]),), f'{self.title} {split} #{i}'


def open_builtin(name: str, *, dir: str = '') -> ArrayStore:
  """Open a dataset inside the package, written by builtin/pack.py."""
  if name not in BUILTIN_LABEL_NAMES:
    near = did_you_mean(name, BUILTIN_LABEL_NAMES)
    raise UserError(f'no built-in dataset is named {name!r}.{near}')
  path = Path(__file__).parent / 'builtin' / f'{name}.npz'
  with np.load(path) as arrays:
    labels = {split: arrays[f'{split}_labels'] for split in ('train', 'test')}
  read_images = functools.partial(_read_npz_images, path)
  return ArrayStore(f'builtin:{name}', BUILTIN_LABEL_NAMES[name], labels, read_images)


def _read_npz_images(path: Path, split: str) -> np.ndarray:
  with np.load(path) as arrays:
    return arrays[f'{split}_images']  # [n, h, w]


def open_idx(path: str, *, dir: str = '') -> ArrayStore:
  """Open a directory of IDX files.

  Raises UserError if there is no such file, or if a file is damaged or does not fit the others.
  """
  folder, title = Path(path), f'idx:{path}'
  files = {split: _find_pair(folder, prefix) for split, prefix in IDX_PREFIXES.items()}
  files = {split: pair for split, pair in files.items() if pair}
  if not files:
    raise UserError(
      f'{title}: expected files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz '
      f'in this directory'
    )
  labels = {split: read_idx(pair[1], dimensions=1) for split, pair in files.items()}
  for split, (images, names) in files.items():
    count = _idx_shape(images, dimensions=3)[0]
    if count != len(labels[split]):
      raise UserError(
        f'{images} has {count:,} images, but {names} has {len(labels[split]):,} labels'
      )
  names = _idx_label_names(folder, 1 + max(int(each.max(initial=0)) for each in labels.values()))
  images = {split: pair[0] for split, pair in files.items()}
  return ArrayStore(title, names, labels, functools.partial(_read_idx_images, images))


def _find_pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
  """Return the files of images and labels whose names begin with `prefix`, or None.

  Raises UserError if there is only one of the two.
  """
  names = f'{prefix}-images-idx3-ubyte', f'{prefix}-labels-idx1-ubyte'
  found = [
    next((path for path in (folder / name, folder / f'{name}.gz') if path.is_file()), None)
    for name in names
  ]
  if not any(found):
    return None
  if not all(found):
    raise UserError(
      f'idx:{folder} has no file {names[found.index(None)]} or {names[found.index(None)]}.gz'
    )
  return tuple(found)


def _idx_label_names(folder: Path, classes: int) -> tuple[str, ...]:
  """Return the lines of labels.txt, or the numbers of the classes."""
  path = folder / 'labels.txt'
  if not path.is_file():
    return tuple(map(str, range(classes)))
  names = read_class_names(path)
  if len(names) < classes:
    raise UserError(f'{path} names {len(names)} classes, but the labels go up to {classes - 1}')
  return names


def _read_idx_images(files: dict[str, Path], split: str) -> np.ndarray:
  return read_idx(files[split], dimensions=3)


def _idx_shape(path: Path, *, dimensions: int) -> tuple[int, ...]:
  """Return the shape that the header of an IDX file states. Raises UserError if it is another."""
  with _open(path) as file:
    header = _read(file, path, 4 + 4 * dimensions)
  kind, count = header[2], header[3]
  if header[:2] != b'\0\0' or (kind, count) != (_IDX_UINT8, dimensions):
    raise UserError(
      f'{path}: expected an IDX file of bytes with {dimensions} dimensions, which begins with '
      f'0000{_IDX_UINT8:02x}{dimensions:02x}, not {header[:4].hex()}'
    )
  return tuple(np.frombuffer(header, '>u4', dimensions, 4).tolist())


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
  """Return the uint8 array of an IDX file. Raises UserError if the file is damaged."""
  shape = _idx_shape(path, dimensions=dimensions)
  start, size = 4 + 4 * dimensions, math.prod(shape)
  with _open(path) as file:
    content = _read(file, path, start + size)
    if _read(file, path, 1, short=True):
      raise UserError(f'{path} is longer than its header states: {size:,} bytes of data')
  return np.frombuffer(content, np.uint8, size, start).reshape(shape)


def _open(path: Path):
  """Open a file, decompressed if it is gzipped. Its name does not count."""
  with path.open('rb') as file:
    is_gzip = file.read(2) == _GZIP_MAGIC
  return gzip.open(path) if is_gzip else path.open('rb')


def _read(file, path: Path, size: int, *, short: bool = False) -> bytes:
  """Read `size` bytes, or up to that many if `short`.

  Raises UserError if there are fewer, or if they are damaged.
  """
  try:
    content = file.read(size)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f'{path} is damaged: {error}') from None
  if len(content) < size and not short:
    raise UserError(f'{path} ends early: expected {size:,} bytes or more, found {len(content):,}')
  return content
