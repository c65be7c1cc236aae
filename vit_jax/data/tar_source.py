"""WebDataset archives: uncompressed tars in which the files of one example follow each other.

    000012.jpg  000012.cls     an image and the number of its class
    000013.jpg  000013.txt     an image and the name of its class, which may consist of digits
    000014.png  000014.json    an image and an object with `label`, `labels` or `cls`

The name of an example is the path up to the first dot of the file name. Other files are ignored.
`labels.txt` beside the archives names numbered classes.
"""

import collections
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit_jax.data.archive_store import ArchiveStore, Index, check_class_number, encode_labels
from vit_jax.data.image_files import MAX_IMAGE_FILE_BYTES, image_extensions, note_passed_over
from vit_jax.errors import UserError, one_line

LABEL_EXTENSIONS = ('.cls', '.txt', '.json')
JSON_KEYS = ('label', 'labels', 'cls')
MAX_LABEL_BYTES = 1 << 20
READ_BYTES = 1 << 20
TarExample = tuple[str, int, int, list[int | str] | None]  # Name, position, size, labels or None.
COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZ': 'bzip2', b'\xfd7': 'xz', b'\x28\xb5': 'zstd'}


class TarStore(ArchiveStore):
  """The examples of WebDataset archives."""

  kind, suffix = 'tar', '.tar'
  compressed_suffixes = ('.tgz', '.tbz2', '.txz', '.tzst')

  def __init__(self, path: str, *, dir: str = ''):
    super().__init__(path, dir=dir)
    others = collections.Counter()
    for index in itertools.chain.from_iterable(self._indices.values()):
      others.update(json.loads(str(index['passed_over'])))
    note_passed_over(self.title, {'': dict(others)})

  def index_file(self, path: Path) -> Index:
    """Return the names, labels, positions and sizes of the images of an archive."""
    names, labels, spans, others = [], [], [], collections.Counter()
    try:
      for name, offset, size, label in _list_examples(path, others, with_labels=self.needs_labels):
        if label is None and self.needs_labels:
          raise UserError(
            f'{path}: {name} has no label; expected a file beside it with the extension '
            f'{", ".join(LABEL_EXTENSIONS)}'
          )
        names.append(os.fsencode(name))
        labels.append(encode_labels(label or []))
        spans.append((offset, size))
    except (tarfile.TarError, EOFError) as error:
      raise UserError(
        f'{path} is not a tar archive that can be read: {_describe(path, error)}'
      ) from None
    offsets, sizes = np.array(spans, np.int64).reshape(-1, 2).T
    return {
      'names': np.array(names, 'S'),
      'labels': np.array(labels, 'S'),
      'offsets': offsets,
      'sizes': sizes,
      'passed_over': np.array(json.dumps(others)),
    }

  def read_image(self, path: Path, index: Index, row: int) -> bytes:
    """Return the image of a row of an index."""
    size = int(index['sizes'][row])
    if size > MAX_IMAGE_FILE_BYTES:
      raise ValueError(f'{size:,} bytes are too many for an image')
    with path.open('rb', buffering=0) as file:
      data = os.pread(file.fileno(), size, int(index['offsets'][row]))
    if len(data) < size:
      raise ValueError('it ends early')
    return data


class UnlabelledTarStore(TarStore):
  """The images of WebDataset archives, whose labels, if they have any, are not used."""

  needs_labels = False


def _list_examples(
  path: Path, others: collections.Counter, *, with_labels: bool
) -> Iterator[TarExample]:
  """Yield the examples of an archive that have an image. Count those with only labels, by kind."""
  label_extensions = LABEL_EXTENSIONS if with_labels else ()
  with tarfile.open(path, 'r:') as archive:
    for _, group in itertools.groupby(_list_members(archive), key=lambda each: _split(each)[0]):
      members = list(group)
      found = (_read_labels(path, archive, member, label_extensions) for member in members)
      labels = next((each for each in found if each is not None), None)
      images = [each for each in members if '.' + _split(each)[1] in image_extensions()]
      yield from ((each.name, each.offset_data, each.size, labels) for each in images[:1])
      if labels and not images:
        kinds = ['.' + _split(each)[1] for each in members]
        others[next((kind for kind in kinds if kind not in LABEL_EXTENSIONS), kinds[0])] += 1


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
  """Return (name of the example, extension in lower case) of a file of an archive."""
  folder, slash, file = member.name.rpartition('/')
  stem, _, extension = file.partition('.')
  return folder + slash + stem, extension.lower()


def _list_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
  """Yield the regular, visible files of an archive. `tarfile` itself would hold all in memory."""
  while (member := archive.next()) is not None:
    archive.members = []
    if member.isreg() and not member.issparse() and member.name.rpartition('/')[2][:1] != '.':
      yield member
  _check_end(archive)


def _check_end(archive: tarfile.TarFile):
  """Raise ReadError unless only zeros follow. `tarfile` takes a damaged header for the end."""
  archive.fileobj.seek(archive.offset)
  is_first = True
  while block := archive.fileobj.read(tarfile.BLOCKSIZE if is_first else READ_BYTES):
    if block.count(0) < len(block):
      problem = 'a damaged header' if is_first else 'data after the end, as joined archives have'
      raise tarfile.ReadError(f'{problem}, after byte {archive.offset:,}')
    is_first = False


def _read_labels(
  path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, extensions: tuple[str, ...]
) -> list[int | str] | None:
  """Return the labels in a file of an archive, or None if it has none.

  Raises UserError if it is not what its extension, one of `extensions`, says.
  """
  extension = '.' + _split(member)[1]
  if extension not in extensions:
    return None
  try:
    if member.size > MAX_LABEL_BYTES:
      raise ValueError(f'{member.size:,} bytes')
    text = archive.extractfile(member).read().decode().strip()
    if extension == '.txt' and text:
      return [text]  # A name, also if it consists of digits, as the name of a folder may.
    if extension != '.json':
      return [_parse_label(text)]
    values = json.loads(text)
    found = next((values[key] for key in JSON_KEYS if values.get(key) is not None), None)
    if found is None:
      return None
    return [_parse_label(each) for each in (found if isinstance(found, list) else [found])]
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    problem = one_line(error, limit=200)
    raise UserError(f'{path}: {member.name} is not a label: {problem}') from None


def _parse_label(value) -> int | str:
  """Return the number or the name of a class."""
  if isinstance(value, bool) or not isinstance(value, int | str) or value == '':
    raise ValueError(f'expected the number or the name of a class, got {value!r:.80}')
  is_number = isinstance(value, str) and value.isdecimal()
  return check_class_number(int(value) if is_number else value)


def _describe(path: Path, error: Exception) -> str:
  """Say why a file is not an archive that can be read at random."""
  with path.open('rb') as file:
    packer = COMPRESSED.get(file.read(2))
  if packer:
    return f'it is compressed with {packer}, which has no random access; decompress it'
  return one_line(error, limit=200)
