"""Packed data: ArrayRecord shards with a manifest, written by `data pack` (pack.py).

    DIR/manifest.json                        source, label names, splits, checksums of the files
    DIR/train-00000-of-00012.array_record    records in the order of the split
    DIR/train-labels.npy                     labels, int32 [n, m] padded with -1, if the source
                                             lists them

A record is the length of a JSON header, uint32 little-endian; the header; and the image. The
header has `labels`, `name` and, if the image is not a file but pixels, their `shape`. A record of
an image that could not be read when it was packed has the reason, `error`, instead.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import resource
import struct
from bisect import bisect_right
from pathlib import Path

import numpy as np

from vit_jax.data.decode import BadImageError, ImageData
from vit_jax.data.folder import resolve_existing_path
from vit_jax.errors import UserError, one_line
from vit_jax.runtime.files import read_json_object

MANIFEST = 'manifest.json'
UNFINISHED = '.packing'  # The directory of what is known about an unfinished packing.
FORMAT, VERSION = 'vit_jax records', 1
SPARE_OPEN_FILES = 256  # Beside the shards, which stay open.
_LENGTH = struct.Struct('<I')


@dataclasses.dataclass(frozen=True, slots=True)
class PackedFile:
  """A file of packed data: a shard, or the labels of a split."""

  file: str
  examples: int
  bytes: int
  sha256: str
  unreadable: int = 0  # Records of images that could not be read.


@dataclasses.dataclass(frozen=True, slots=True)
class PackedSplit:
  """A split of packed data."""

  spec: str  # The split of the source, such as 'train[:90%]'.
  listing: str  # The checksum of that split's names and labels.
  max_labels: int  # The largest number of labels of an example, at least 1.
  shards: tuple[PackedFile, ...]
  content: str = ''  # The checksum of samples of its images; '' in older manifests.
  labels: PackedFile | None = None  # None if only the records state labels.

  @property
  def examples(self) -> int:
    """The number of examples."""
    return sum(shard.examples for shard in self.shards)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
  """The content of manifest.json."""

  source: str  # The name of the source that was packed.
  source_kind: str  # 'folder' for images of the user; the default decoding depends on it.
  label_names: tuple[str, ...]
  reencode: dict[str, object] | None  # How large images were made smaller, or None.
  splits: dict[str, PackedSplit]

  def to_json(self) -> str:
    """Return the text of manifest.json."""
    return json.dumps({'format': FORMAT, 'version': VERSION} | dataclasses.asdict(self), indent=1)


def read_manifest(folder: Path) -> Manifest:
  """Read the manifest of packed data. Raises UserError if there is none, or if it is not valid."""
  path = folder / MANIFEST
  if not path.exists():
    if (folder / UNFINISHED).exists():
      raise UserError(f'{folder} is not packed to the end; run the same `data pack` again')
    raise UserError(f'{folder} has no {MANIFEST}; expected a directory that `data pack` wrote')
  values = read_json_object(path)
  if values.pop('format', None) != FORMAT:
    raise UserError(f'{path} does not describe records; expected what `data pack` writes')
  if (version := values.pop('version', None)) != VERSION:
    raise UserError(f'{path} has version {version!r:.20}; this program reads version {VERSION}')
  try:
    splits = {name: _parse_split(split) for name, split in values['splits'].items()}
    names = tuple(values['label_names'])
    manifest = Manifest(**(values | {'splits': splits, 'label_names': names}))
    texts = (manifest.source, manifest.source_kind, *names)
    if not splits or not all(isinstance(text, str) for text in texts):
      raise TypeError('expected splits, and names that are text')
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is not valid: {one_line(error, limit=200)}; pack again') from None
  return manifest


def _parse_split(values: dict) -> PackedSplit:
  labels = values['labels'] and _parse_file(values['labels'])
  shards = tuple(map(_parse_file, values['shards']))
  split = PackedSplit(**(values | {'shards': shards, 'labels': labels}))
  if type(split.max_labels) is not int or split.max_labels < 1 or not shards:
    raise ValueError(f'max_labels={split.max_labels!r:.20}, {len(shards)} shards')
  return split


def _parse_file(values: dict) -> PackedFile:
  file = PackedFile(**values)
  name = file.file
  if not isinstance(name, str) or Path(name).name != name or name in ('', '..') or '\0' in name:
    raise ValueError(f'{file.file!r:.80} is not the name of a file')
  if not all(type(count) is int and count > 0 for count in (file.examples, file.bytes)):
    raise ValueError(f'{file.file}: examples={file.examples!r:.20}, bytes={file.bytes!r:.20}')
  if type(file.unreadable) is not int or not 0 <= file.unreadable <= file.examples:
    raise ValueError(f'{file.file}: unreadable={file.unreadable!r:.20}')
  return file


def encode_record(data: ImageData, labels: tuple[int, ...], name: str) -> bytes:
  """Return the record of an example."""
  header = {'name': name, 'labels': list(labels)}
  if isinstance(data, np.ndarray):
    header['shape'] = list(data.shape)
    data = np.ascontiguousarray(data, np.uint8).tobytes()
  return _join_record(header, data)


def encode_unreadable_record(labels: tuple[int, ...], name: str, reason: str) -> bytes:
  """Return the record of an example whose image could not be read."""
  return _join_record({'name': name, 'labels': list(labels), 'error': reason}, b'')


def is_unreadable_record(record: bytes) -> bool:
  """Return whether a record is one of `encode_unreadable_record`."""
  (length,) = _LENGTH.unpack_from(record)
  has_data = len(record) > _LENGTH.size + length
  return not has_data and 'error' in json.loads(record[_LENGTH.size :])


def _join_record(header: dict, data: bytes) -> bytes:
  text = json.dumps(header, separators=(',', ':')).encode()
  return b''.join((_LENGTH.pack(len(text)), text, data))


def decode_record(record: bytes, name: str) -> tuple[ImageData, tuple[int, ...], str]:
  """Return (image, labels, name) of a record.

  Args:
    record: The bytes.
    name: Name of the record in messages. That of the example is appended.

  Raises BadImageError if the record is not valid or says that the image could not be read.
  """
  try:
    (length,) = _LENGTH.unpack_from(record)
    data = record[_LENGTH.size + length :]
    header = json.loads(record[_LENGTH.size : _LENGTH.size + length])
    name = f'{name} ({header["name"]})'
    labels = tuple(header['labels'])
    if 'shape' in header:
      data = np.frombuffer(data, np.uint8).reshape(header['shape'])
  except (struct.error, ValueError, TypeError, KeyError) as error:
    raise BadImageError(name, f'the record is damaged: {one_line(error)}') from None
  if 'error' in header:
    raise BadImageError(name, f'when it was packed: {header["error"]}')
  return data, labels, name


class RecordStore:
  """Packed data, as a store of sources.py. The shards of a split are opened when it is read."""

  def __init__(self, path: str, manifest: Manifest, root: Path):
    self.title, self._root = f'records:{path}', root
    self.source_kind = manifest.source_kind
    self.label_names, self.splits = manifest.label_names, tuple(manifest.splits)
    self._packed = manifest.splits
    self._ends = {
      name: list(itertools.accumulate(shard.examples for shard in split.shards))
      for name, split in manifest.splits.items()
    }
    self._checked, self._readers = set(), {}

  def __getstate__(self) -> dict:
    return self.__dict__ | {'_readers': {}}

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split.

    Raises UserError if a shard is missing or has another size.
    """
    if split not in self._checked:
      check_sizes(self._root, self._packed[split].shards)
      self._checked.add(split)
    return [shard.examples for shard in self._packed[split].shards]

  def max_labels(self, split: str) -> int:
    """Return the largest number of labels of an example."""
    return self._packed[split].max_labels

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when an example of a split changes."""
    return repr([shard.sha256 for shard in self._packed[split].shards]).encode()

  def read_example(self, split: str, i: int) -> tuple[ImageData, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    shard = bisect_right(self._ends[split], i)
    first = self._ends[split][shard - 1] if shard else 0
    name = f'{self.title} {self._packed[split].shards[shard].file} #{i - first}'
    reader = self._open(split)
    try:
      record = reader[i]
    except Exception as error:  # ArrayRecord documents no error types.
      raise BadImageError(name, f'the record is damaged: {one_line(error)}') from None
    data, labels, name = decode_record(record, name)
    if not all(type(x) is int and 0 <= x < len(self.label_names) for x in labels):
      problem = f'labels {labels} are out of range for {len(self.label_names)} classes'
      raise BadImageError(name, problem)
    return data, labels, name

  def _open(self, split: str):
    if split not in self._readers:
      from array_record.python.array_record_data_source import ArrayRecordDataSource

      shards = self._packed[split].shards
      _allow_open_files(len(shards), self.title)
      # With the range, ArrayRecord opens a file without counting its records.
      self._readers[split] = ArrayRecordDataSource(
        [f'{self._root / shard.file}[0:{shard.examples}]' for shard in shards]
      )
    return self._readers[split]


class ListedRecordStore(RecordStore):
  """Packed data of a source that lists its labels."""

  def read_labels(self, split: str) -> np.ndarray:
    """Return the labels [n, m] of all examples of a split, padded with -1."""
    return read_label_table(self._root, self._packed[split], len(self.label_names))


def open_records(path: str, *, dir: str = '', labelled: bool = True) -> RecordStore:
  """Open packed data. Raises UserError if it has no labels, unless `labelled` is False."""
  root = resolve_existing_path(path)
  manifest = read_manifest(root)
  if labelled and not manifest.label_names:
    raise UserError(
      f'records:{path} was packed from {manifest.source} without labels; it can be '
      'config.data.unlabelled'
    )
  listed = all(split.labels for split in manifest.splits.values())
  return (ListedRecordStore if listed else RecordStore)(path, manifest, root)


def open_unlabelled_records(path: str, *, dir: str = '') -> RecordStore:
  """Open packed data with or without labels."""
  return open_records(path, labelled=False)


def check_sizes(root: Path, files: tuple[PackedFile, ...]):
  """Raise UserError if a file of packed data is missing or has another size."""
  with concurrent.futures.ThreadPoolExecutor(64) as pool:  # The threads wait for storage.
    sizes = pool.map(file_size, [root / each.file for each in files])
    for each, size in zip(files, sizes, strict=True):
      if size is None:
        raise UserError(f'{root / each.file} is missing; pack again, or copy it again')
      if size != each.bytes:
        raise UserError(
          f'{root / each.file} has {size:,} bytes, but the manifest lists {each.bytes:,}; pack '
          'again, or copy it again'
        )


def file_size(path: Path) -> int | None:
  """Return the size of a file, or None if there is none."""
  try:
    return path.stat().st_size
  except FileNotFoundError:
    return None


def read_label_table(root: Path, split: PackedSplit, classes: int) -> np.ndarray:
  """Return the labels [n, m] of a split. Raises UserError if its file is damaged."""
  path = root / split.labels.file
  try:
    table = np.load(path, allow_pickle=False)
  except FileNotFoundError:
    raise UserError(f'{path} is missing; pack again, or copy it again') from None
  except (ValueError, EOFError, SyntaxError) as error:
    raise UserError(f'{path} is damaged: {one_line(error, limit=200)}; copy it again') from None
  is_table = table.dtype == np.int32 and table.ndim == 2 and len(table) == split.examples
  if not is_table or not -1 <= table.min(initial=-1) <= table.max(initial=-1) < max(1, classes):
    raise UserError(f'{path} does not fit the manifest: it has {table.dtype} {list(table.shape)}')
  return table


def _allow_open_files(count: int, title: str):
  """Raise this process's limit of open files if it has no room for `count` shards.

  Raises UserError if the system does not allow as many.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + SPARE_OPEN_FILES
  if soft == resource.RLIM_INFINITY or soft >= needed:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise UserError(
      f'{title} has {count:,} shards, but a process may open {hard:,} files; raise `ulimit -Hn`, '
      'or pack again with fewer --shards'
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
