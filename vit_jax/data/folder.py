"""Image files on disk: a folder of class folders, a CSV of paths and labels, or a folder of images.

  PATH/train/CLASS/*  PATH/test/CLASS/*    splits of any names; the classes are those of `train`
  PATH/CLASS/*                             split into `train` and `test` by `split_train_test`
  PATH.csv                                 lines `path,label;label`, split in the same way

Paths in a CSV are relative to the CSV file. Hidden files, hidden folders and folders without images
are ignored. File names are stored as one fixed-width array of bytes, so that sending a million of
them to a worker process costs one copy.
"""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.errors import UserError, did_you_mean

IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif')  # In upper or lower case.
# A folder with one of these names is a split if it contains class folders.
SPLIT_FOLDERS = ('train', 'test', 'validation', 'val')
EXPECTED_LAYOUT = 'Expected PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or PATH/CLASS/IMAGE'
CSV_HEADERS = ('path', 'image', 'file', 'filename')
TEST_FRACTION = 0.1
MAX_IMAGE_FILE_BYTES = 1 << 30  # Larger files are not read.

Examples = tuple[np.ndarray, np.ndarray]  # Paths, bytes [n]; labels, int32 [n, m] padded with -1.


def split_train_test(names: list[bytes]) -> tuple[list[bytes], list[bytes]]:
  """Split the examples of one class into (train, test).

  A tenth is held out, and at least one of two or more. The split is ordered by a hash of each
  name, so it is the same on every machine and needs no seed.
  """
  ranked = sorted(names, key=lambda name: hashlib.blake2b(name, digest_size=8).digest())
  held_out = max(1, round(TEST_FRACTION * len(names))) if len(names) > 1 else 0
  return sorted(ranked[held_out:]), sorted(ranked[:held_out])


class _ImageFileStore:
  """Image files below `_root`: `_examples` maps a split to its paths and labels."""

  _root: Path
  _examples: dict[str, Examples]

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    return [len(self._examples[split][0])]

  def max_labels(self, split: str) -> int:
    """Return the largest number of labels of an example."""
    return max(1, int((self._examples[split][1] >= 0).sum(axis=1).max(initial=0)))

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when the list of examples of a split changes."""
    paths, labels = self._examples[split]
    return paths.tobytes() + labels.tobytes()

  def read_example(self, split: str, i: int) -> tuple[bytes, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    paths, labels = self._examples[split]
    path = self._root / os.fsdecode(paths[i])
    return read_image_file(path), tuple(x for x in labels[i].tolist() if x >= 0), str(path)


class FolderStore(_ImageFileStore):
  """A folder of class folders. Only the splits that are read are listed in full."""

  def __init__(self, path: str, *, dir: str = ''):
    self._root = resolve_existing_path(path)
    self.title = f'folder:{path}'
    if not self._root.is_dir():
      is_csv = self._root.suffix == '.csv'
      remedy = f'use csv:{path}' if is_csv else 'unpack archives first'
      raise UserError(f'{path} is a file, not a folder; {remedy}. {EXPECTED_LAYOUT}')
    self._is_flat = not any(_list_classes(self._root / split) for split in SPLIT_FOLDERS)
    self._examples = {}  # Filled by `shard_lengths`.
    folders = [self._root / name for name in _list_folders(self._root)]
    folders = [self._root] if self._is_flat else folders
    classes = {folder.name: names for folder in folders if (names := _list_classes(folder))}
    if not classes:
      extensions = ' '.join(IMAGE_EXTENSIONS)
      raise UserError(f'{path} has no class folders with images ({extensions}). {EXPECTED_LAYOUT}')
    all_classes = sorted({name for names in classes.values() for name in names})
    if self._is_flat:
      self.splits, self.label_names = ('train', 'test'), tuple(all_classes)
    else:
      self.splits = tuple(sorted(classes, key=_split_sort_key))
      self.label_names = tuple(classes.get('train', all_classes))
    if len(self.label_names) < 2:
      only = self.label_names[0]
      raise UserError(
        f'{path} has only one class ({only}); a classifier needs two. {EXPECTED_LAYOUT}'
      )
    for split in set(classes).intersection(SPLIT_FOLDERS):
      self._check_classes(split, classes[split])

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    if split not in self._examples:
      self._examples |= (
        self._split_flat_folder() if self._is_flat else {split: self._list_split(split)}
      )
    return super().shard_lengths(split)

  def _check_classes(self, split: str, classes: list[str]):
    for name in classes:
      if name not in self.label_names:
        near = did_you_mean(name, self.label_names, list_known=False)
        raise UserError(
          f'{self._root / split / name}: the training split {self._root / "train"} has no class '
          f'{name!r}.{near} Add the class to the training split or remove the folder'
        )

  def _list_split(self, split: str) -> Examples:
    classes = _list_classes(self._root / split)
    self._check_classes(split, classes)
    files = [
      [os.fsencode(f'{split}/{name}/{file}') for file in _list_images(self._root / split / name)]
      for name in classes
    ]
    return _flatten_by_label(files, [self.label_names.index(name) for name in classes])

  def _split_flat_folder(self) -> dict[str, Examples]:
    files = [
      [os.fsencode(f'{name}/{file}') for file in _list_images(self._root / name)]
      for name in self.label_names
    ]
    train, test = zip(*map(split_train_test, files), strict=True)
    labels = range(len(self.label_names))
    return {'train': _flatten_by_label(train, labels), 'test': _flatten_by_label(test, labels)}


class CsvStore(_ImageFileStore):
  """A CSV file of lines `path,label;label`, with any number of labels per image.

  The labels of several lines with one path are combined. A header line is skipped.
  """

  def __init__(self, path: str, *, dir: str = ''):
    file = resolve_existing_path(path)
    if file.is_dir():
      raise UserError(f'{path} is a folder, not a CSV file; use folder:{path}')
    self.title, self.splits, self._root = f'csv:{path}', ('train', 'test'), file.parent
    try:
      labels = _read_csv_labels(file)
    except (UnicodeDecodeError, csv.Error) as error:
      raise UserError(f'{path} is not a CSV file in UTF-8: {error}') from None
    self.label_names = tuple(sorted({name for names in labels.values() for name in names}))
    if len(self.label_names) < 2:
      got = f'only one class ({self.label_names[0]})' if self.label_names else 'no labels'
      raise UserError(f'{path} has {got}; a classifier needs two')
    # Grouped by the first label, so that the test split of a single-label file is stratified.
    groups = {}
    for name, names in labels.items():
      groups.setdefault(names[:1], []).append(name)
    train, test = zip(
      *(split_train_test(group) for _, group in sorted(groups.items())), strict=True
    )
    self._examples = {'train': self._tabulate(labels, train), 'test': self._tabulate(labels, test)}

  def _tabulate(self, labels: dict[bytes, tuple[str, ...]], groups) -> Examples:
    index = {name: i for i, name in enumerate(self.label_names)}
    paths = sorted(path for group in groups for path in group)
    table = np.full((len(paths), max(map(len, labels.values()))), -1, np.int32)
    for row, path in zip(table, paths, strict=True):
      row[: len(labels[path])] = [index[name] for name in labels[path]]
    return np.array(paths, 'S'), table


class UnlabelledFolderStore(_ImageFileStore):
  """All image files below a folder, without labels, in one split sorted by path."""

  label_names = ()
  splits = ('train',)

  def __init__(self, path: str, *, dir: str = ''):
    self._root, self.title = resolve_existing_path(path), f'images:{path}'
    if not self._root.is_dir():
      raise UserError(f'{path} is a file, not a folder of images')
    paths = np.array(sorted(self._find_images()), 'S')
    if not len(paths):
      extensions = ' '.join(IMAGE_EXTENSIONS)
      raise UserError(f'{path} and the folders below it contain no images ({extensions})')
    self._examples = {'train': (paths, np.zeros((len(paths), 0), np.int32))}

  def _find_images(self) -> list[bytes]:
    """Return the paths of all images, relative to the root."""
    out = []
    for folder, folders, files in os.walk(self._root):
      folders[:] = [name for name in folders if name[0] != '.']
      images = [Path(folder, name) for name in files if has_image_name(name)]
      out += [os.fsencode(path.relative_to(self._root)) for path in images]
    return out


def _read_csv_labels(file: Path) -> dict[bytes, tuple[str, ...]]:
  """Return {path: its sorted labels}.

  Raises UserError with the number of the first invalid line.
  """
  out = {}
  with file.open(newline='', encoding='utf-8-sig') as lines:
    for number, row in enumerate(csv.reader(lines), start=1):
      if not row or (number == 1 and row[0].strip().lower() in CSV_HEADERS):
        continue
      if len(row) != 2:
        got = f'{len(row)} columns: {",".join(row)[:80]!r}'
        raise UserError(f'{file}, line {number}: expected path,label;label but got {got}')
      name = row[0].strip()
      if not out and not (file.parent / name).is_file():  # Only checked for the first image.
        where = f'in {file.parent} (paths are relative to the CSV file)'
        raise UserError(f'{file}, line {number}: no image {name!r} {where}')
      labels = {label.strip() for label in row[1].split(';')} - {''}
      out[os.fsencode(name)] = tuple(sorted(labels.union(out.get(os.fsencode(name), ()))))
  if not out:
    raise UserError(f'{file} is empty; expected lines path,label;label')
  return out


def _flatten_by_label(files, labels) -> Examples:
  """Flatten one list of files per label."""
  paths = np.array([file for group in files for file in group], 'S')
  lengths = [len(group) for group in files]
  return paths, np.repeat(np.fromiter(labels, np.int32), lengths)[:, None]


def read_image_file(path: Path) -> bytes:
  """Read a file.

  Raises BadImageError if it cannot be read or is larger than MAX_IMAGE_FILE_BYTES.
  """
  try:
    with path.open('rb') as file:
      if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_FILE_BYTES:
        raise BadImageError(str(path), f'{size:,} bytes are too many for an image')
      return file.read()
  except OSError as error:
    raise BadImageError(str(path), f'the file cannot be read ({error.strerror})') from None


def resolve_existing_path(path: str) -> Path:
  """Expand `~` in a path.

  Raises UserError with the nearest existing parent if the path does not exist.
  """
  out = Path(path).expanduser()
  if not out.exists():
    parent = next(p for p in (out, *out.parents) if p.exists())
    raise UserError(f'no such file or folder: {path} (the nearest existing folder is {parent})')
  return out


def has_image_name(name: str) -> bool:
  """Return whether a file name is that of an image and not hidden."""
  return name.lower().endswith(IMAGE_EXTENSIONS) and name[0] != '.'


def _split_sort_key(name: str) -> tuple[int, str]:
  return (SPLIT_FOLDERS.index(name) if name in SPLIT_FOLDERS else len(SPLIT_FOLDERS)), name


def _is_image_file(entry: os.DirEntry) -> bool:
  return has_image_name(entry.name) and entry.is_file()


def _list_images(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if _is_image_file(entry))


def _list_folders(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.name[0] != '.' and entry.is_dir())


def _list_classes(folder: Path) -> list[str]:
  """Return the folders in `folder` that contain an image; [] if `folder` does not exist."""
  if not folder.is_dir():
    return []
  return [name for name in _list_folders(folder) if _has_image(folder / name)]


def _has_image(folder: Path) -> bool:
  """Return whether a folder contains an image, without listing it in full."""
  with os.scandir(folder) as entries:
    return any(_is_image_file(entry) for entry in entries)
