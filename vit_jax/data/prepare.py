"""Which data sets there are, and how a TFDS data set comes to lie on disk as ArrayRecord.

`prepare_dataset` downloads and builds one, or converts one that was prepared as TFRECORD. Converting copies records from one
container to the other: it needs neither TensorFlow nor the data set's code, and leaves the TFRECORD files as they are.
"""

import inspect
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from vit_jax.data.sources import BUILTIN_LABEL_NAMES, STORES, open_source
from vit_jax.data.tfds_source import (
  find_prepared_builder,
  has_array_record,
  is_tfds_dataset,
  unknown_dataset_error,
)
from vit_jax.errors import UserError, check_installed


class SourceRow(NamedTuple):
  """A source that can be trained on, or what keeps it from that, as a person reads it."""

  source: str  # 'tfds:cifar10'.
  examples: str  # 'train 50,000, test 10,000'.
  classes: str  # '10 classes'.
  note: str  # One line, '' where there is nothing to say.


def list_sources(dir: str = '') -> list[SourceRow]:
  """The built-in data sets, then those prepared under `dir` ('' means TFDS's default), in alphabetical order."""
  import tensorflow_datasets as tfds

  root = tfds.core.Path(dir or tfds.core.constants.DATA_DIR).expanduser()
  found = [*root.glob('*/*/dataset_info.json'), *root.glob('*/*/*/dataset_info.json')]
  names = sorted({f'tfds:{"/".join(path.relative_to(root).parts[:-2])}' for path in found})
  return [
    _describe_source(name, str(root))
    for name in [*(f'builtin:{name}' for name in BUILTIN_LABEL_NAMES), *names]
  ]


def prepare_dataset(name: str, dir: str = '') -> SourceRow:
  """Makes the TFDS data set `name` ('cifar10', 'voc/2007') readable under `dir`. Does nothing where it is already."""
  kind, colon, rest = name.partition(':')
  name = rest if kind == 'tfds' else name
  if colon and kind in STORES and kind != 'tfds':
    raise UserError(f'{name} is read as it is; only TFDS data sets are prepared')
  try:
    builder = find_prepared_builder(name, dir)
    if not builder:
      _build_dataset(name, dir)
    elif not has_array_record(builder.info):
      convert_to_array_record(builder.info)
  except (
    OSError,
    RuntimeError,
  ) as error:  # RuntimeError is what ArrayRecord raises of a full disk.
    raise UserError(f'tfds:{name}: {_one_line(error)}') from None
  return _describe_source(f'tfds:{name}', dir)


def convert_to_array_record(info):
  """Writes ArrayRecord files beside the TFRECORD files of a data set. Starts again where it was interrupted."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info

  if info.file_format != tfds.core.FileFormat.TFRECORD:
    raise UserError(
      f'tfds:{info.full_name} is prepared as {info.file_format.name}; only TFRECORD can be converted'
    )
  suffix = tfds.core.FileFormat.ARRAY_RECORD.file_suffix
  total = sum(split.num_examples for split in info.splits.values())
  with tqdm(total=total, unit=' examples', desc=f'Converting {info.full_name}') as bar:
    for split in info.splits.values():
      shards = len(split.shard_lengths)
      outputs = split.filename_template.replace(filetype_suffix=suffix)
      for i, (path, examples) in enumerate(zip(split.filepaths, split.shard_lengths, strict=True)):
        convert_tfrecord_file(
          Path(path), Path(outputs.sharded_filepath(shard_index=i, num_shards=shards)), examples
        )
        bar.update(examples)
  proto = dataset_info.read_proto_from_builder_dir(info.data_dir)
  proto.alternative_file_formats.append(suffix)
  dataset_info.write_dataset_info_proto(proto, dataset_info_dir=info.data_dir)


def convert_tfrecord_file(source: Path, target: Path, examples: int):
  """A TFRECORD file -> an ArrayRecord file of the same records; nothing where the target is there already."""
  from array_record.python.array_record_module import ArrayRecordWriter

  if target.exists():
    return
  unfinished = target.with_name(f'incomplete.{target.name}')
  writer = ArrayRecordWriter(
    str(unfinished), 'group_size:1'
  )  # Other group sizes make random access slow.
  count = 0
  try:
    for record in read_tfrecords(source):
      writer.write(record)
      count += 1
    if count != examples:
      raise UserError(
        f'{source} holds {count} examples, but its data set says {examples}: prepare it again'
      )
    writer.close()
    unfinished.rename(target)
  finally:
    unfinished.unlink(missing_ok=True)


def read_tfrecords(path: Path) -> Iterator[bytes]:
  """The records of a TFRECORD file: length uint64, its checksum uint32, data, its checksum (neither is looked at)."""
  left = path.stat().st_size
  with path.open('rb') as file:
    while left:
      header = file.read(12)
      length = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else left
      left -= 16 + length
      if left < 0:
        raise UserError(f'{path} is cut short: prepare the data set again')
      yield file.read(length)
      file.seek(4, 1)


def _build_dataset(name: str, dir: str):
  """Runs TFDS's own builder, with its progress bars."""
  import tensorflow_datasets as tfds

  if not is_tfds_dataset(name):
    raise unknown_dataset_error(name, dir)
  try:
    builder = tfds.builder(name, data_dir=dir or None, file_format='array_record')
    if _needs_tensorflow(builder):  # Before the download, not after.
      check_installed(f'tfds:{name}: building it, once,', 'prepare', 'tensorflow')
    _check_manual_files(name, builder, Path(dir or tfds.core.constants.DATA_DIR).expanduser())
    builder.download_and_prepare()
  except ImportError as error:
    package = error.name or str(error)
    if package.startswith('tensorflow'):
      package = "'vit-jax[prepare]'"
    raise UserError(f'tfds:{name}: building it needs a package: pip install {package}') from None
  except (AssertionError, TypeError, ValueError) as error:  # Versions, options, checksums.
    raise UserError(f'tfds:{name}: {_one_line(error)}') from None


def _needs_tensorflow(builder) -> bool:
  return bool(re.search(r'\btf\.\w', inspect.getsource(inspect.getmodule(type(builder)))))


def _check_manual_files(name: str, builder, root: Path):
  """Some data sets may only be downloaded by a person, who agrees to terms."""
  manual = root / 'downloads' / 'manual'
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
    how = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    raise UserError(f'tfds:{name} has to be downloaded by hand into {manual}: {how}')


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:500] or type(error).__name__


def _describe_source(name: str, dir: str) -> SourceRow:
  try:
    source = open_source(name, 'all', dir=dir)
  except UserError as error:
    return SourceRow(name, '', '', str(error))
  examples = ', '.join(f'{split} {count:,}' for split, count in source.examples.items())
  return SourceRow(name, examples, f'{source.classes:,} classes', '')
