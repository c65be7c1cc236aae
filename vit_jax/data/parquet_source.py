"""Parquet tables of images, in the layout of the data sets of the Hugging Face hub.

The column `image` has structs {bytes, path}, or bytes. The column `label` or `labels` has numbers,
names, or lists of them. The metadata of the schema name numbered classes.

A row can only be read with the others of its row group. Training reads rows in random order, so
pack a table first (pack.py), unless its row groups are small.
"""

import collections
import json
import threading
from pathlib import Path

import numpy as np

from vit_jax.data.archive_store import ArchiveStore, Index, check_class_number, encode_labels
from vit_jax.errors import UserError, check_installed, one_line

IMAGE_COLUMNS = ('image', 'img')
LABEL_COLUMNS = ('label', 'labels', 'fine_label')
MAX_ROW_GROUP_BYTES = 2**31 - 1  # Of images: what an Arrow array can have.
CACHED_ROW_GROUPS = 4  # Of the image column, in memory.


class ParquetStore(ArchiveStore):
  """The rows of parquet files."""

  kind, suffix = 'parquet', '.parquet'

  def __init__(self, path: str, *, dir: str = ''):
    check_installed('reading parquet files', 'parquet', 'pyarrow')
    self._start_cache()
    super().__init__(path, dir=dir)

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name not in _PER_PROCESS}

  def __setstate__(self, state: dict):
    self.__dict__.update(state)
    self._start_cache()

  def _start_cache(self):
    self._row_groups, self._lock = collections.OrderedDict(), threading.Lock()

  def index_file(self, path: Path) -> Index:
    """Return the names, labels and row groups of a table."""
    import pyarrow
    import pyarrow.parquet

    try:
      table = pyarrow.parquet.ParquetFile(path)
      schema = table.schema_arrow
      image, label = _find_column(path, schema, IMAGE_COLUMNS), None
      if self.needs_labels:
        label = _find_column(path, schema, LABEL_COLUMNS)
      groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
      is_struct = pyarrow.types.is_struct(schema.field(image).type)
      column = _find_bytes(path, schema.field(image))
      _check_row_groups(path, table.metadata, column)
      labels = table.read([label])[label].to_pylist() if label else [None] * sum(groups)
      names = _read_paths(table, image) if is_struct else [''] * sum(groups)
    except (pyarrow.ArrowException, OSError) as error:
      raise UserError(f'{path} is not a parquet file: {one_line(error, limit=200)}') from None
    named = [f'#{i} {name}'.strip().encode() for i, name in enumerate(names)]
    return {
      'names': np.array(named, 'S'),
      'labels': np.array(
        [encode_labels(_list_labels(path, i, each)) for i, each in enumerate(labels)], 'S'
      ),
      'group_ends': np.cumsum(groups, dtype=np.int64),
      'column': np.array(column),
      'classes': np.array(json.dumps(_read_class_names(schema, label))),
    }

  def read_image(self, path: Path, index: Index, row: int) -> bytes:
    """Return the image of a row of an index."""
    group = int(np.searchsorted(index['group_ends'], row, side='right'))
    first = int(index['group_ends'][group - 1]) if group else 0
    data = self._read_row_group(path, str(index['column']), group)[row - first].as_py()
    if data is None:
      raise ValueError('the row has no bytes; a table of paths is not a table of images')
    return data

  def _read_row_group(self, path: Path, column: str, group: int):
    """Return the images of a row group, as an Arrow array. Recent ones are in memory."""
    import pyarrow
    import pyarrow.parquet

    with self._lock:  # Threads that need the same row group wait for the first.
      if (path, group) not in self._row_groups:
        try:
          table = pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column])
        except pyarrow.ArrowException as error:
          raise ValueError(one_line(error, limit=200)) from None
        images = table.column(0).combine_chunks()
        field = column.partition('.')[2]
        self._row_groups[path, group] = images.field(field) if field else images
        while len(self._row_groups) > CACHED_ROW_GROUPS:
          self._row_groups.popitem(last=False)
      self._row_groups.move_to_end((path, group))
      return self._row_groups[path, group]

  def class_names(self) -> tuple[str, ...]:
    """Return the names of numbered classes, or () if no table states them."""
    indices = [index for each in self._indices.values() for index in each]
    stated = {tuple(json.loads(str(index['classes']))) for index in indices} - {()}
    if len(stated) > 1:
      raise UserError(f'{self.title}: its files name different classes')
    return stated.pop() if stated else super().class_names()


class UnlabelledParquetStore(ParquetStore):
  """The images of parquet files, whose labels, if they have any, are not used."""

  needs_labels = False


_PER_PROCESS = ('_row_groups', '_lock')


def _find_column(path: Path, schema, names: tuple[str, ...]) -> str:
  """Return the first of `names` that a table has. Raises UserError if it has none."""
  found = next((name for name in names if name in schema.names), None)
  if not found:
    expected, has = ' or '.join(names), ', '.join(schema.names)
    raise UserError(f'{path} has no column {expected}; it has {has}')
  return found


def _find_bytes(path: Path, field) -> str:
  """Return the column with the bytes of images. Raises UserError if the field has none."""
  import pyarrow

  is_struct, kind = pyarrow.types.is_struct(field.type), field.type
  if is_struct:
    kind = next((child.type for child in kind if child.name == 'bytes'), None)
  accepted = pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_null
  if kind is None or not any(is_accepted(kind) for is_accepted in accepted):
    raise UserError(
      f'{path}: the column {field.name} is {field.type!s:.80}; expected bytes, or structs with '
      'the field bytes'
    )
  return f'{field.name}.bytes' if is_struct else field.name


def _check_row_groups(path: Path, metadata, column: str):
  """Raise UserError if a row group has more images than Arrow can hold in an array."""
  for group in map(metadata.row_group, range(metadata.num_row_groups)):
    for part in map(group.column, range(group.num_columns)):
      if part.path_in_schema == column and part.total_uncompressed_size > MAX_ROW_GROUP_BYTES:
        raise UserError(
          f'{path} has a row group with {part.total_uncompressed_size:,} bytes of images; at most '
          f'{MAX_ROW_GROUP_BYTES:,} can be read. Write it again with smaller row groups'
        )


def _read_paths(table, image: str) -> list[str]:
  """Return the file names of the images of a table, '' where there is none."""
  if not any(field.name == 'path' for field in table.schema_arrow.field(image).type):
    return [''] * table.metadata.num_rows
  column = table.read([f'{image}.path']).column(0).combine_chunks()
  return [name or '' for name in column.field('path').to_pylist()]


def _list_labels(path: Path, row: int, value) -> list[int | str]:
  """Return the labels of a row: none for a null or for -1, which stand for unknown."""
  labels = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(label, int | str) for label in labels):
    expected = 'expected the number or name of a class'
    raise UserError(f'{path} row {row}: {value!r:.80} is not a label; {expected}')
  try:
    return [check_class_number(label) for label in labels if label != -1]
  except ValueError as error:
    raise UserError(f'{path} row {row}: {error}') from None


def _read_class_names(schema, label: str | None) -> list[str]:
  """Return the names of the classes in the metadata that `datasets` writes, or []."""
  try:
    features = json.loads(schema.metadata[b'huggingface'])['info']['features']
    feature = features[label]
    feature = feature.get('feature', feature)  # Of a sequence.
    names = feature.get('names') or []
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
    return []
  return [str(name) for name in names] if isinstance(names, list) else []
