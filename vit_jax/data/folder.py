"""Image files on disk: a folder of class folders, or a CSV of paths and labels.

  PATH/train/CLASS/*  PATH/test/CLASS/*    splits as they lie, whatever their names; the classes are those of `train`
  PATH/CLASS/*                             divided into `train` and `test` (`split_train_test`)
  PATH.csv                                 `path,label;label` in each line, paths relative to the file; divided likewise

Hidden files and folders are passed over, and so are folders without an image. File names are kept as one fixed-width
array of bytes: a million of them cross to a worker process at the cost of a copy.
"""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from vit_jax.data.images import BadImageError
from vit_jax.errors import UserError, did_you_mean

IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif')  # In any case.
SPLIT_FOLDERS = (
  'train',
  'test',
  'validation',
  'val',
)  # A folder of one of these names that holds class folders is a split.
EXPECTED_LAYOUT = 'Expected PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or PATH/CLASS/IMAGE'
CSV_HEADERS = ('path', 'image', 'file', 'filename')
TEST_FRACTION = 0.1
MAX_IMAGE_FILE_BYTES = 1 << 30  # Bytes of a file that is read at all.


def split_train_test(names: list[bytes]) -> tuple[list[bytes], list[bytes]]:
  """(train, test) of the examples of one class: a tenth is held out, at least one where there are two.

  By the order of a hash of each name: no clock, no seed, the same on every machine.
  """
  ranked = sorted(names, key=lambda name: hashlib.blake2b(name, digest_size=8).digest())
  held_out = max(1, round(TEST_FRACTION * len(names))) if len(names) > 1 else 0
  return sorted(ranked[held_out:]), sorted(ranked[:held_out])


class FolderStore:
  """A folder of class folders. Only the splits that are read are listed in full."""

  def __init__(self, path: str, *, dir: str = ''):
    self._root = resolve_existing_path(path)
    self.title = f'folder:{path}'
    if not self._root.is_dir():
      kind = (
        f'csv:{path} reads it'
        if self._root.suffix == '.csv'
        else 'an archive must be unpacked first'
      )
      raise UserError(f'{path} is a file, not a folder ({kind}). {EXPECTED_LAYOUT}')
    self._flat = not any(_list_classes(self._root / split) for split in SPLIT_FOLDERS)
    self._examples = {}  # {split: (paths under the root, labels)}, once it is listed.
    folders = (
      [self._root] if self._flat else [self._root / name for name in _list_folders(self._root)]
    )
    found = {folder.name: classes for folder in folders if (classes := _list_classes(folder))}
    if not found:
      raise UserError(
        f'{path} holds no class folders with images ({" ".join(IMAGE_EXTENSIONS)}). {EXPECTED_LAYOUT}'
      )
    self.splits = ('train', 'test') if self._flat else tuple(sorted(found, key=_split_sort_key))
    every = sorted({name for classes in found.values() for name in classes})
    self.label_names = tuple(every if self._flat else found.get('train', every))
    if len(self.label_names) < 2:
      raise UserError(
        f'{path} holds one class only ({self.label_names[0]}): a classifier needs two. {EXPECTED_LAYOUT}'
      )
    for split in set(found).intersection(SPLIT_FOLDERS):
      self._validate(split, found[split])

  def shards(self, split: str) -> list[int]:
    if split not in self._examples:
      self._examples |= self._divide() if self._flat else {split: self._list(split)}
    return [len(self._examples[split][0])]

  def most_labels(self, split: str) -> int:
    return 1

  def listing(self, split: str) -> bytes:
    paths, labels = self._examples[split]
    return paths.tobytes() + labels.tobytes()

  def read(self, split: str, i: int):
    paths, labels = self._examples[split]
    path = self._root / os.fsdecode(paths[i])
    return read_image_file(path), (int(labels[i]),), str(path)

  def _validate(self, split: str, classes: list[str]):
    for name in classes:
      if name not in self.label_names:
        near = did_you_mean(name, self.label_names).partition(' Known')[0]
        raise UserError(
          f'{self._root / split / name} holds a class that {self._root / "train"} lacks: {name!r}.{near} '
          f'Add it to the training split or take it away'
        )

  def _list(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    classes = _list_classes(self._root / split)
    self._validate(split, classes)
    files = [
      [os.fsencode(f'{split}/{name}/{file}') for file in _list_images(self._root / split / name)]
      for name in classes
    ]
    return _flatten_by_label(files, [self.label_names.index(name) for name in classes])

  def _divide(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    each = [
      [os.fsencode(f'{name}/{file}') for file in _list_images(self._root / name)]
      for name in self.label_names
    ]
    train, test = zip(*map(split_train_test, each), strict=True)
    labels = range(len(self.label_names))
    return {'train': _flatten_by_label(train, labels), 'test': _flatten_by_label(test, labels)}


class CsvStore:
  """Any number of labels an image: each line is `path,label;label`, and lines of one path add up.

  A first line that names the columns is passed over.
  """

  def __init__(self, path: str, *, dir: str = ''):
    file = resolve_existing_path(path)
    if file.is_dir():
      raise UserError(f'{path} is a folder, not a CSV file (folder:{path} reads it)')
    self.title, self.splits, self._root = f'csv:{path}', ('train', 'test'), file.parent
    try:
      labels = _read_csv_labels(file)
    except (UnicodeDecodeError, csv.Error) as error:
      raise UserError(f'{path} is no CSV file in UTF-8: {error}') from None
    self.label_names = tuple(sorted({name for names in labels.values() for name in names}))
    if len(self.label_names) < 2:
      got = f'one class only ({self.label_names[0]})' if self.label_names else 'no labels'
      raise UserError(f'{path} holds {got}: a classifier needs two')
    width = max(map(len, labels.values()))
    index = {name: i for i, name in enumerate(self.label_names)}
    groups = {}  # By the first label, so that the held-out part of a single-label file is stratified.
    for name, names in labels.items():
      groups.setdefault(names[:1], []).append(name)
    parts = zip(*(split_train_test(names) for _, names in sorted(groups.items())), strict=True)
    self._examples = {}
    for split, part in zip(self.splits, parts, strict=True):
      names = sorted(name for group in part for name in group)
      table = np.full((len(names), width), -1, np.int32)  # -1 pads.
      for row, name in zip(table, names, strict=True):
        row[: len(labels[name])] = [index[each] for each in labels[name]]
      self._examples[split] = np.array(names, 'S'), table

  def shards(self, split: str) -> list[int]:
    return [len(self._examples[split][0])]

  def most_labels(self, split: str) -> int:
    return max(1, int((self._examples[split][1] >= 0).sum(axis=1).max(initial=0)))

  def listing(self, split: str) -> bytes:
    paths, labels = self._examples[split]
    return paths.tobytes() + labels.tobytes()

  def read(self, split: str, i: int):
    paths, labels = self._examples[split]
    path = self._root / os.fsdecode(paths[i])
    return (
      read_image_file(path),
      tuple(label for label in labels[i].tolist() if label >= 0),
      str(path),
    )


def _read_csv_labels(file: Path) -> dict[bytes, tuple[str, ...]]:
  """{path: its labels, sorted}. UserError names the first line that is wrong."""
  out = {}
  with file.open(newline='', encoding='utf-8-sig') as lines:
    for number, row in enumerate(csv.reader(lines), start=1):
      if not row or (number == 1 and row[0].strip().lower() in CSV_HEADERS):
        continue
      if len(row) != 2:
        got = f'{len(row)} columns: {",".join(row)[:80]!r}'
        raise UserError(f'{file}, line {number}: expected path,label;label but got {got}')
      name = row[0].strip()
      if not out and not (file.parent / name).is_file():
        raise UserError(
          f'{file}, line {number}: no image {name!r} in {file.parent} (paths are relative to the CSV)'
        )
      labels = {label.strip() for label in row[1].split(';')} - {''}
      out[os.fsencode(name)] = tuple(sorted(labels.union(out.get(os.fsencode(name), ()))))
  if not out:
    raise UserError(f'{file} holds no lines: expected path,label;label in each')
  return out


def _flatten_by_label(files: list[list[bytes]], labels) -> tuple[np.ndarray, np.ndarray]:
  """One list of files for each label -> (all files, the label of each)."""
  flat = [file for each in files for file in each]
  return np.array(flat, 'S'), np.repeat(
    np.fromiter(labels, np.int32), [len(each) for each in files]
  )


def read_image_file(path: Path) -> bytes:
  """All of it. BadImage where it cannot be read, or is larger than any image."""
  try:
    with path.open('rb') as file:
      if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_FILE_BYTES:
        raise BadImageError(str(path), f'{size:,} bytes are more than any image has')
      return file.read()
  except OSError as error:
    raise BadImageError(str(path), f'cannot be read ({error.strerror})') from None


def resolve_existing_path(path: str) -> Path:
  """The path. UserError, with the nearest that is there, where there is no such."""
  out = Path(path).expanduser()
  if not out.exists():
    parent = next(p for p in (out, *out.parents) if p.exists())
    raise UserError(f'no such file or folder: {path} ({parent} is there)')
  return out


def _split_sort_key(name: str) -> tuple[int, str]:
  return (SPLIT_FOLDERS.index(name) if name in SPLIT_FOLDERS else len(SPLIT_FOLDERS)), name


def _is_image_file(entry: os.DirEntry) -> bool:
  return entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.name[0] != '.' and entry.is_file()


def _list_images(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if _is_image_file(entry))


def _list_folders(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.name[0] != '.' and entry.is_dir())


def _list_classes(folder: Path) -> list[str]:
  """The folders in `folder` that hold an image; stops at the first image of each. [] where there is no such folder."""
  return (
    [name for name in _list_folders(folder) if _has_image(folder / name)] if folder.is_dir() else []
  )


def _has_image(folder: Path) -> bool:
  with os.scandir(folder) as entries:
    return any(_is_image_file(entry) for entry in entries)
