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
import io
import itertools
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.data.decode import BadImageError, ImageData
from vit_jax.data.folder import resolve_existing_path
from vit_jax.data.object_storage import ObjectShards
from vit_jax.data.shards import LocalShards
from vit_jax.errors import UserError, one_line
from vit_jax.runtime.files import read_json_object

MANIFEST = 'manifest.json'
UNFINISHED = '.packing'  # The directory of what is known about an unfinished packing.
FORMAT, VERSION = 'vit_jax records', 1
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
  return parse_manifest(read_json_object(path), path)


def is_packed(folder: Path) -> bool:
  """Return whether a directory has a manifest of packed data, of any version."""
  try:
    return read_json_object(folder / MANIFEST).get('format') == FORMAT
  except (OSError, UserError):
    return False


def parse_manifest(values: dict, path: Path | str) -> Manifest:
  """Return the manifest with these values. Raises UserError, with `path`, if it is not valid."""
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
  except (struct.error, ValueError, TypeError, KeyError, RecursionError) as error:
    raise BadImageError(name, f'the record is damaged: {one_line(error)}') from None
  if 'error' in header:
    raise BadImageError(name, f'when it was packed: {header["error"]}')
  return data, labels, name


class RecordStore:
  """Packed data, as a store of sources.py. Shards are opened when they are read."""

  def __init__(self, path: str, manifest: Manifest, files: LocalShards | ObjectShards):
    self.title, self._files = f'records:{path}', files
    self.source_kind = manifest.source_kind
    self.label_names, self.splits = manifest.label_names, tuple(manifest.splits)
    self._packed = manifest.splits
    self._ends = {
      name: list(itertools.accumulate(shard.examples for shard in split.shards))
      for name, split in manifest.splits.items()
    }
    self._checked = set()

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split.

    Raises UserError if a shard is missing or has another size. In object storage that is found
    when the shard is first read.
    """
    if isinstance(self._files, LocalShards) and split not in self._checked:
      check_sizes(self._files.root, self._packed[split].shards)
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
    shard, row = self._locate(split, i)
    name = f'{self.title} {shard.file} #{row}'
    try:
      record = self._files.read_record(shard, row)
    except UserError:
      raise
    except Exception as error:  # ArrayRecord documents no error types.
      raise BadImageError(name, f'the record is damaged: {one_line(error)}') from None
    data, labels, name = decode_record(record, name)
    if not all(type(x) is int and 0 <= x < len(self.label_names) for x in labels):
      problem = f'labels {labels} are out of range for {len(self.label_names)} classes'
      raise BadImageError(name, problem)
    return data, labels, name

  def read_ahead(self, examples: Iterable[tuple[str, int]]):
    """Begin to fetch (split, example) that are needed soon, if they are in object storage."""
    if isinstance(self._files, ObjectShards):
      self._files.read_ahead([self._locate(split, i) for split, i in examples])

  def _locate(self, split: str, i: int) -> tuple[PackedFile, int]:
    """Return (shard, number of the record in it) of an example."""
    shard = bisect_right(self._ends[split], i)
    return self._packed[split].shards[shard], i - (self._ends[split][shard - 1] if shard else 0)


class ListedRecordStore(RecordStore):
  """Packed data of a source that lists its labels."""

  def read_labels(self, split: str) -> np.ndarray:
    """Return the labels [n, m] of all examples of a split, padded with -1."""
    packed, classes = self._packed[split], len(self.label_names)
    if isinstance(self._files, LocalShards):
      return read_label_table(self._files.root, packed, classes)
    content = self._files.read_file(packed.labels.file, packed.labels.bytes)
    return _load_label_table(io.BytesIO(content), packed.labels.file, packed, classes)


def open_records(path: str, *, dir: str = '', labelled: bool = True) -> RecordStore:
  """Open packed data. Raises UserError if it has no labels, unless `labelled` is False."""
  files, manifest = _open_url(path) if '://' in path else _open_folder(path)
  if labelled and not manifest.label_names:
    raise UserError(
      f'records:{path} was packed from {manifest.source} without labels; it can be '
      'config.data.unlabelled'
    )
  listed = all(split.labels for split in manifest.splits.values())
  return (ListedRecordStore if listed else RecordStore)(path, manifest, files)


def _open_folder(path: str) -> tuple[LocalShards, Manifest]:
  root = resolve_existing_path(path)
  return LocalShards(root), read_manifest(root)


def _open_url(url: str) -> tuple[ObjectShards, Manifest]:
  files = ObjectShards(url)
  try:
    values = json.loads(files.read_file(MANIFEST))
  except (ValueError, RecursionError):
    values = None
  if not isinstance(values, dict):
    raise UserError(f'{url}/{MANIFEST} is not a JSON object; expected what `data pack` writes')
  return files, parse_manifest(values, f'{url}/{MANIFEST}')


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
    return _load_label_table(path, path, split, classes)
  except FileNotFoundError:
    raise UserError(f'{path} is missing; pack again, or copy it again') from None


def _load_label_table(
  content: Path | io.BytesIO, path: Path | str, split: PackedSplit, classes: int
) -> np.ndarray:
  try:
    table = np.load(content, allow_pickle=False)
  except (ValueError, EOFError, SyntaxError) as error:
    raise UserError(f'{path} is damaged: {one_line(error, limit=200)}; copy it again') from None
  is_table = table.dtype == np.int32 and table.ndim == 2 and len(table) == split.examples
  if not is_table or not -1 <= table.min(initial=-1) <= table.max(initial=-1) < max(1, classes):
    raise UserError(f'{path} does not fit the manifest: it has {table.dtype} {list(table.shape)}')
  return table
