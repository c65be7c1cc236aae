"""Image files on disk: a folder of class folders, a CSV of paths and labels, or a folder of images.

  PATH/train/CLASS/*  PATH/test/CLASS/*    splits of any names; the classes are those of `train`
  PATH/CLASS/*                             split into `train` and `test` by `split_train_test`
  PATH.csv                                 lines `path,label;label`, split in the same way

The images of a class may be in folders below CLASS. Paths in a CSV are relative to the CSV file.
Hidden files and hidden folders are ignored. File names are stored as one fixed-width array of
bytes, so that sending a million of them to a worker process costs one copy.
"""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from vit_jax.data.class_names import normalize_class_name
from vit_jax.data.image_files import (
  describe_other_files,
  has_image,
  image_extensions,
  list_folders,
  list_images,
  note_passed_over,
  printable,
  read_image_file,
  suggest_heic,
)
from vit_jax.errors import UserError, did_you_mean

# A folder with one of these names is a split if it contains class folders.
SPLIT_FOLDERS = ('train', 'test', 'validation', 'val')
EXPECTED_LAYOUT = 'Expected PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or PATH/CLASS/IMAGE'
CSV_HEADERS = ('path', 'image', 'file', 'filename')
TEST_FRACTION = 0.1

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

  def read_labels(self, split: str) -> np.ndarray:
    """Return the labels [n, m] of all examples of a split, padded with -1."""
    return self._examples[split][1]

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when the list of examples of a split changes."""
    paths, labels = self._examples[split]
    return paths.tobytes() + labels.tobytes()

  def read_example(self, split: str, i: int) -> tuple[bytes, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    paths, labels = self._examples[split]
    path = self._root / os.fsdecode(paths[i])
    return read_image_file(path), tuple(x for x in labels[i].tolist() if x >= 0), printable(path)


class FolderStore(_ImageFileStore):
  """A folder of class folders. Only the splits that are read are listed in full."""

  def __init__(self, path: str, *, dir: str = ''):
    self._root = resolve_existing_path(path)
    self.title = f'folder:{path}'
    if not self._root.is_dir():
      remedies = {
        '.csv': f'use csv:{path}',
        '.parquet': f'use parquet:{path}',
        '.tar': f'unpack it, or use tar:{path} if it is a WebDataset archive',
      }
      remedy = remedies.get(self._root.suffix, 'unpack archives first')
      raise UserError(f'{path} is a file, not a folder; {remedy}. {EXPECTED_LAYOUT}')
    self._is_flat = not any(_list_classes(self._root / split) for split in SPLIT_FOLDERS)
    self._examples = {}  # Filled by `shard_lengths`.
    folders = [self._root / name for name in list_folders(self._root)]
    folders = [self._root] if self._is_flat else folders
    classes = {folder.name: names for folder in folders if (names := _list_classes(folder))}
    if not classes:
      raise UserError(f'{path} has no class folders with images: {self._describe_contents()}')
    all_classes = sorted({name for names in classes.values() for name in names})
    if self._is_flat:
      self.splits, self.label_names = ('train', 'test'), tuple(all_classes)
    else:
      self.splits = tuple(sorted(classes, key=_split_sort_key))
      self.label_names = tuple(classes.get('train', all_classes))
    if len(self.label_names) < 2:
      only = self.label_names[0]
      raise UserError(
        f'{path} has only one class ({printable(only)}); a classifier needs two. {EXPECTED_LAYOUT}'
      )
    # A class may be spelled with composed characters in one split and decomposed ones in another.
    self._class_indices = {normalize_class_name(name): i for i, name in enumerate(self.label_names)}
    if self._is_flat:
      self._check_not_nested()
      _check_no_class_is_empty(self._root, all_classes)
    for split in set(classes).intersection(SPLIT_FOLDERS):
      self._check_classes(split, classes[split])

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    if split not in self._examples:
      self._examples |= (
        self._split_flat_folder() if self._is_flat else {split: self._list_split(split)}
      )
    return super().shard_lengths(split)

  def _describe_contents(self) -> str:
    """Say what a folder without images has, and what is expected."""
    images, others = list_images(self._root)
    if images:
      return f'its images are not in folders of classes. {EXPECTED_LAYOUT}'
    found = f'it has only {describe_other_files(others)}' if others else 'it has no files'
    extensions = ' '.join(image_extensions())
    return f'{found}{suggest_heic(others)}. {EXPECTED_LAYOUT}, with the extensions {extensions}'

  def _check_not_nested(self):
    """Raise UserError if the folders are data sets and not classes."""
    for name in self.label_names:
      for split in SPLIT_FOLDERS:
        if _list_classes(self._root / name / split):
          raise UserError(
            f'{self._root / name} is not a class but has class folders in {split}/; '
            f'use folder:{self._root / name}'
          )

  def _check_classes(self, split: str, classes: list[str]):
    _check_no_class_is_empty(self._root / split, classes)
    for name in classes:
      if normalize_class_name(name) not in self._class_indices:
        near = did_you_mean(name, self.label_names, list_known=False)
        folder = printable(self._root / split / name)
        raise UserError(
          f'{folder}: the training split {self._root / "train"} has no class '
          f'{name!r}.{near} Add the class to the training split or remove the folder'
        )

  def _list_split(self, split: str) -> Examples:
    classes = _list_classes(self._root / split)
    self._check_classes(split, classes)
    files = self._list_class_images(f'{self.title} {split}', f'{split}/', classes)
    labels = [self._class_indices[normalize_class_name(name)] for name in classes]
    return _flatten_by_label(files, labels)

  def _split_flat_folder(self) -> dict[str, Examples]:
    files = self._list_class_images(self.title, '', self.label_names)
    train, test = zip(*map(split_train_test, files), strict=True)
    labels = range(len(self.label_names))
    return {'train': _flatten_by_label(train, labels), 'test': _flatten_by_label(test, labels)}

  def _list_class_images(self, title: str, prefix: str, classes) -> list[list[bytes]]:
    """Return the images of each class, and print how many files are passed over."""
    out, passed_over = [], {}
    for name in classes:
      images, others = list_images(self._root / prefix / name)
      out.append([os.fsencode(f'{prefix}{name}/{image}') for image in images])
      passed_over[name] = others
    note_passed_over(title, passed_over)
    return out


class CsvStore(_ImageFileStore):
  """A CSV file of lines `path,label;label`, with any number of labels per image.

  The labels of several lines with one path are combined. A header line is skipped.
  """

  def __init__(self, path: str, *, dir: str = ''):
    file = resolve_existing_path(path)
    if file.is_dir():
      raise UserError(f'{path} is a folder, not a CSV file; use folder:{path}')
    if not file.is_file():
      raise UserError(f'{path} is not a regular file')
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
    images, others = list_images(self._root)
    if not images:
      found = f'; found {describe_other_files(others)}' if others else ''
      raise UserError(
        f'{path} and the folders below it contain no images ({" ".join(image_extensions())})'
        f'{found}{suggest_heic(others)}'
      )
    note_passed_over(self.title, {'': others})
    paths = np.array(sorted(map(os.fsencode, images)), 'S')
    self._examples = {'train': (paths, np.zeros((len(paths), 0), np.int32))}


def _read_csv_labels(file: Path) -> dict[bytes, tuple[str, ...]]:
  """Return {path: its sorted labels}. Raises UserError if the file is not valid."""
  try:
    return _parse_csv_labels(file)
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{file} is not a CSV file in UTF-8: {error}') from None


def _parse_csv_labels(file: Path) -> dict[bytes, tuple[str, ...]]:
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


def resolve_existing_path(path: str) -> Path:
  """Expand `~` in a path.

  Raises UserError with the nearest existing parent if the path does not exist.
  """
  try:
    out = Path(path).expanduser()
  except RuntimeError:
    raise UserError(f'{path}: this user has no home directory') from None
  if not out.exists():
    parent = next(p for p in (out, *out.parents) if p.exists())
    raise UserError(f'no such file or folder: {path} (the nearest existing folder is {parent})')
  return out


def _split_sort_key(name: str) -> tuple[int, str]:
  return (SPLIT_FOLDERS.index(name) if name in SPLIT_FOLDERS else len(SPLIT_FOLDERS)), name


def _list_classes(folder: Path) -> list[str]:
  """Return the folders in `folder` that contain an image; [] if `folder` does not exist."""
  if not folder.is_dir():
    return []
  return [name for name in list_folders(folder) if has_image(folder / name)]


def _check_no_class_is_empty(folder: Path, classes: list[str]):
  """Raise UserError if a folder in `folder` is not one of `classes`, those with images."""
  for name in sorted(set(list_folders(folder)).difference(classes)):
    _, others = list_images(folder / name)
    found = f'only {describe_other_files(others)}' if others else 'no files'
    raise UserError(
      f'{printable(folder / name)} is a class folder without images: it has {found}. Add images '
      f'({" ".join(image_extensions())}) or remove the folder{suggest_heic(others)}'
    )
