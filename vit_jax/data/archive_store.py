"""Image files inside archives: WebDataset tars and parquet tables, as stores of sources.py.

    PATH                                   one archive
    PATH/train-0000.tar  PATH/val/0.tar    archives of splits, named in the folder or in the file

A file without the name of a split is in `train`. An archive is indexed once: the index has the name
and labels of each example and is in the user's cache directory. It is made again if the size or the
time of the archive changes.
"""

import hashlib
import io
import itertools
import json
import re
import zipfile
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.class_names import read_class_names
from vit_jax.data.decode import BadImageError
from vit_jax.data.folder import SPLIT_FOLDERS, resolve_existing_path
from vit_jax.data.image_files import image_extensions, printable
from vit_jax.errors import UserError
from vit_jax.runtime.files import user_cache_dir, write_atomically

INDEX_VERSION = 3  # Increase it when the content of an index changes.
GENERIC_NAMES = ('part', 'shard', 'data', 'images')  # Of files; they name no split.
LABEL_FILES = ('labels.txt', 'classes.txt', 'classnames.txt')  # A class name per line.

MAX_CLASSES = 1_000_000  # A larger number is no class, but an id of something else.
COMPRESSED_SUFFIXES = ('.gz', '.bz2', '.xz', '.zst')

Index = dict[str, np.ndarray]  # At least 'names', bytes [n], and 'labels', JSON lists as bytes [n].


class ArchiveStore:
  """The examples of archives. Subclasses say how an archive is indexed and read."""

  kind: str
  suffix: str
  compressed_suffixes: tuple[str, ...] = ()  # Besides `suffix` with COMPRESSED_SUFFIXES.
  needs_labels = True

  def __init__(self, path: str, *, dir: str = ''):
    self.title, self._root = f'{self.kind}:{path}', resolve_existing_path(path)
    self._files: dict[str, list[Path]] = {}
    for file in self._list_files():
      self._files.setdefault(name_split(file.relative_to(self._root.parent)), []).append(file)
    order = {name: i for i, name in enumerate(SPLIT_FOLDERS)}
    self.splits = tuple(sorted(self._files, key=lambda name: (order.get(name, len(order)), name)))
    self._indices = {
      split: [self.read_index(file) for file in files] for split, files in self._files.items()
    }
    self._ends = {
      split: list(itertools.accumulate(len(index['names']) for index in indices))
      for split, indices in self._indices.items()
    }
    self.label_names, self._labels = (), {}
    if self.needs_labels:
      self._number_labels()

  def index_file(self, path: Path) -> Index:
    """Return the index of an archive."""
    raise NotImplementedError

  def read_image(self, path: Path, index: Index, row: int) -> bytes:
    """Return the image of a row of an index.

    Raises OSError or ValueError if it cannot be read.
    """
    raise NotImplementedError

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    return [len(index['names']) for index in self._indices[split]]

  def max_labels(self, split: str) -> int:
    """Return the largest number of labels of an example."""
    if not self.needs_labels:
      return 1
    return max(1, int((self._labels[split] >= 0).sum(axis=1).max(initial=0)))

  def read_labels(self, split: str) -> np.ndarray:
    """Return the labels [n, m] of all examples of a split, padded with -1."""
    return self._labels[split] if self.needs_labels else np.zeros((self._ends[split][-1], 0), int)

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when the list of examples of a split changes."""
    names = b''.join(index['names'].tobytes() for index in self._indices[split])
    return names + self.read_labels(split).tobytes()

  def read_example(self, split: str, i: int) -> tuple[bytes, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    file = bisect_right(self._ends[split], i)
    row = i - (self._ends[split][file - 1] if file else 0)
    path, index = self._files[split][file], self._indices[split][file]
    name = printable(f'{path} {index["names"][row].decode("utf-8", "replace")}')
    try:
      if not np.array_equal(index['stamp'], _stamp(path)):
        raise BadImageError(name, 'the archive has changed since the program began')
      image = self.read_image(path, index, row)
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or error
      raise BadImageError(name, f'the archive cannot be read ({reason})') from None
    labels = self._labels[split][i].tolist() if self.needs_labels else []
    return image, tuple(x for x in labels if x >= 0), name

  def _list_files(self) -> list[Path]:
    """Return the archives, sorted. Raises UserError if there are none."""
    if not self._root.is_dir():
      return [self._root]
    compressed = (*(self.suffix + each for each in COMPRESSED_SUFFIXES), *self.compressed_suffixes)
    files = sorted(
      file
      for file in self._root.rglob('*')
      if file.name.endswith((self.suffix, *compressed))
      and file.is_file()
      and not any(part[0] == '.' for part in file.relative_to(self._root).parts)
    )
    for file in files:
      if file.name.endswith(compressed):
        raise UserError(f'{file} is compressed, so it has no random access; decompress it')
    if not files:
      raise UserError(f'{self.title} has no {self.suffix} files')
    return files

  def read_index(self, file: Path) -> Index:
    """Return the index of an archive from the cache, or make it.

    Raises UserError if the archive has no examples or cannot be read.
    """
    kind = f'{type(self).__name__} {" ".join(image_extensions())}'
    index = load_index(file, kind, self.index_file)
    if not len(index['names']):
      raise UserError(f'{file} has no images')
    return index

  def _number_labels(self):
    """Set the names of the classes, and the labels [n, m] of each split."""
    texts = {
      split: np.concatenate([index['labels'] for index in indices])
      for split, indices in self._indices.items()
    }
    unique = sorted({text for split in texts.values() for text in np.unique(split)})
    lists = {text: json.loads(text) for text in unique}
    self.label_names = self._name_classes({label for labels in lists.values() for label in labels})
    if len(self.label_names) < 2:
      got = f'only one class ({self.label_names[0]})' if self.label_names else 'no labels'
      raise UserError(f'{self.title} has {got}; a classifier needs two')
    numbers = {name: i for i, name in enumerate(self.label_names)}
    width = max(map(len, lists.values()))
    table = np.full((len(unique), width), -1, np.int32)
    for row, labels in zip(table, lists.values(), strict=True):
      row[: len(labels)] = [x if isinstance(x, int) else numbers[x] for x in labels]
    rows = {split: np.searchsorted(np.array(unique), each) for split, each in texts.items()}
    self._labels = {split: table[each] for split, each in rows.items()}
    for indices in self._indices.values():
      for index in indices:
        del index['labels']

  def _name_classes(self, labels: set[int | str]) -> tuple[str, ...]:
    """Return the names of the classes whose labels occur in the archives."""
    if not all(isinstance(label, int) for label in labels):
      if any(isinstance(label, int) for label in labels):
        raise UserError(f'{self.title} has labels that are numbers and labels that are names')
      return tuple(sorted(labels))
    classes = max(labels, default=-1) + 1
    if min(labels, default=0) < 0:
      raise UserError(f'{self.title} has the label {min(labels)}; expected 0 or more')
    names = self.class_names() or tuple(map(str, range(classes)))
    if len(names) < classes:
      raise UserError(f'{self.title} names {len(names)} classes, but has the label {classes - 1}')
    return names

  def class_names(self) -> tuple[str, ...]:
    """Return the names of numbered classes, or () if the archives do not state them."""
    folder = self._root if self._root.is_dir() else self._root.parent
    for path in (folder / name for name in LABEL_FILES):
      if path.is_file():
        return read_class_names(path)
    return ()


def name_split(path: Path) -> str:
  """Return the split of an archive: the last word of its path that names one, or 'train'.

  A file of the Hugging Face hub, such as 'unseen-00000-of-00003.parquet', may have any split. But
  in 'val/part-00000-of-00003.tar' the folder names the split.
  """
  words = re.split(r'[^a-z]+', str(path.with_suffix('')).lower())
  known = [word for word in words if word in SPLIT_FOLDERS]
  numbered = re.fullmatch(r'(\w+)-\d+-of-\d+(-\w+)?', path.stem)
  if numbered and numbered[1].isidentifier():
    names_split = not set(re.split(r'[^a-z]+', numbered[1].lower())).isdisjoint(SPLIT_FOLDERS)
    if names_split or (not known and numbered[1].lower() not in GENERIC_NAMES):
      return numbered[1]
  return known[-1] if known else SPLIT_FOLDERS[0]


def load_index(file: Path, kind: str, build: Callable[[Path], Index]) -> Index:
  """Return the index of an archive from the cache, or build and cache it.

  `kind` distinguishes the indices of different readers of a file. The index has a `stamp`.
  """
  key = hashlib.blake2b(f'{kind} {file.resolve()}'.encode(errors='surrogateescape'), digest_size=16)
  cached, stamp = user_cache_dir('index') / f'{key.hexdigest()}.npz', _stamp(file)
  try:
    with np.load(cached, allow_pickle=False) as arrays:
      index = dict(arrays)
    if np.array_equal(index['stamp'], stamp):
      return index
  except (OSError, ValueError, KeyError, EOFError, SyntaxError, zipfile.BadZipFile):
    pass  # None yet, or damaged.
  index = build(file) | {'stamp': stamp}
  buffer = io.BytesIO()
  np.savez(buffer, **index)
  try:
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, buffer.getvalue())
  except (OSError, UserError):
    pass  # Without a cache the next program makes the index again.
  return index


def _stamp(file: Path) -> np.ndarray:
  """Return the size and the time of a file, with which its index is valid."""
  status = file.stat()
  return np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)


def check_class_number(label: int | str) -> int | str:
  """Return a label. Raises ValueError if it is a number that is too large for one of a class."""
  if isinstance(label, int) and not -MAX_CLASSES < label < MAX_CLASSES:
    expected = f'the number of a class, less than {MAX_CLASSES:,}'
    raise ValueError(f'expected {expected}, or its name; got {label}')
  return label


def encode_labels(labels: list[int | str]) -> bytes:
  """Return the labels of an example as an index has them."""
  return json.dumps(labels, separators=(',', ':')).encode()
