"""List the available datasets, and prepare TFDS datasets as ArrayRecord.

`prepare_dataset` downloads and builds a dataset, or converts one that was prepared as TFRECORD.
Conversion copies the records from one container to the other. It needs neither TensorFlow nor the
code of the dataset, and keeps the TFRECORD files.
"""

import glob
import inspect
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from vit_jax.data.array_store import BUILTIN_LABEL_NAMES
from vit_jax.data.sources import STORES, open_source
from vit_jax.data.tfds_source import (
  find_prepared_builder,
  has_array_record,
  is_tfds_dataset,
  tfds_data_dir,
  unknown_dataset_error,
)
from vit_jax.errors import UserError, check_installed, one_line


class SourceRow(NamedTuple):
  """A source as a row of a table: its contents, or why it cannot be used."""

  source: str  # 'tfds:cifar10'.
  examples: str  # 'train 50,000, test 10,000'.
  classes: str  # '10 classes'.
  note: str  # One line, or ''.


def list_sources(dir: str = '') -> list[SourceRow]:
  """List the built-in datasets and the TFDS datasets prepared in `dir`, in alphabetical order.

  An empty `dir` selects TFDS's default.
  """
  import tensorflow_datasets as tfds

  root = tfds.core.Path(tfds_data_dir(dir)).expanduser()
  # TFDS reads the characters of the directory, too, as a pattern.
  literal = tfds.core.Path(glob.escape(str(root)))
  infos = [*literal.glob('*/*/dataset_info.json'), *literal.glob('*/*/*/dataset_info.json')]
  names = sorted({f'tfds:{"/".join(path.relative_to(root).parts[:-2])}' for path in infos})
  names = [*(f'builtin:{name}' for name in BUILTIN_LABEL_NAMES), *names]
  return [_describe_source(name, str(root)) for name in names]


def prepare_dataset(name: str, dir: str = '') -> SourceRow:
  """Prepare the TFDS dataset `name` ('cifar10', 'voc/2007') in `dir`, unless it already is.

  Raises UserError if TFDS has no such dataset or if preparing it fails.
  """
  kind, colon, rest = name.partition(':')
  name = rest if kind == 'tfds' else name
  if colon and kind in STORES and kind != 'tfds':
    raise UserError(f'{name} needs no preparation; only TFDS datasets are prepared')
  try:
    builder = find_prepared_builder(name, dir)
    if not builder:
      _build_dataset(name, dir)
    elif not has_array_record(builder.info):
      convert_to_array_record(builder.info)
  except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError if the disk is full.
    raise UserError(f'tfds:{name}: {one_line(error)}') from None
  return _describe_source(f'tfds:{name}', dir)


def convert_to_array_record(info):
  """Write ArrayRecord files beside the TFRECORD files of a dataset.

  An interrupted conversion continues with the first missing file.

  Raises UserError if the dataset is not TFRECORD, or if a file is truncated.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info

  if info.file_format != tfds.core.FileFormat.TFRECORD:
    got = f'prepared as {info.file_format.name}'
    raise UserError(f'tfds:{info.full_name} is {got}; only TFRECORD can be converted')
  suffix = tfds.core.FileFormat.ARRAY_RECORD.file_suffix
  total = sum(split.num_examples for split in info.splits.values())
  with tqdm(total=total, unit=' examples', desc=f'Converting {info.full_name}') as bar:
    for split in info.splits.values():
      shards = len(split.shard_lengths)
      outputs = split.filename_template.replace(filetype_suffix=suffix)
      for i, (path, examples) in enumerate(zip(split.filepaths, split.shard_lengths, strict=True)):
        target = Path(outputs.sharded_filepath(shard_index=i, num_shards=shards))
        convert_tfrecord_file(Path(path), target, examples)
        bar.update(examples)
  proto = dataset_info.read_proto_from_builder_dir(info.data_dir)
  proto.alternative_file_formats.append(suffix)
  dataset_info.write_dataset_info_proto(proto, dataset_info_dir=info.data_dir)


def convert_tfrecord_file(source: Path, target: Path, examples: int):
  """Convert a TFRECORD file to an ArrayRecord file of the same records, unless it exists.

  Raises UserError if the file does not have `examples` records, or is truncated.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  if target.exists():
    return
  unfinished = target.with_name(f'incomplete.{target.name}')
  writer = ArrayRecordWriter(str(unfinished), 'group_size:1')  # Larger groups slow random access.
  count = 0
  try:
    for record in read_tfrecords(source):
      writer.write(record)
      count += 1
    if count != examples:
      raise UserError(
        f'{source} has {count} examples, but the metadata lists {examples}; prepare it again'
      )
    writer.close()
    unfinished.rename(target)
  finally:
    unfinished.unlink(missing_ok=True)


def read_tfrecords(path: Path) -> Iterator[bytes]:
  """Yield the records of a TFRECORD file, without comparing their checksums.

  A record is its length, uint64; the checksum of the length, uint32; the data; and the checksum of
  the data, uint32.

  Raises UserError if the file is truncated.
  """
  left = path.stat().st_size
  with path.open('rb') as file:
    while left:
      header = file.read(12)
      length = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else left
      left -= 16 + length
      if left < 0:
        raise UserError(f'{path} is truncated; prepare the dataset again')
      yield file.read(length)
      file.seek(4, 1)


def _build_dataset(name: str, dir: str):
  """Run TFDS's builder, with its progress bars."""
  import tensorflow_datasets as tfds

  if not is_tfds_dataset(name):
    raise unknown_dataset_error(name, dir)
  try:
    builder = tfds.builder(name, data_dir=dir or None, file_format='array_record')
    if _needs_tensorflow(builder):  # Checked before the download.
      check_installed(f'building tfds:{name}', 'prepare', 'tensorflow')
    _check_manual_files(name, builder, Path(tfds_data_dir(dir)).expanduser())
    builder.download_and_prepare()
  except ImportError as error:
    package = error.name or str(error)
    if package.startswith('tensorflow'):
      package = "'vit-jax[prepare]'"
    raise UserError(f'building tfds:{name} needs a package: pip install {package}') from None
  except (AssertionError, TypeError, ValueError) as error:  # Versions, options, checksums.
    raise UserError(f'tfds:{name}: {one_line(error)}') from None


def _needs_tensorflow(builder) -> bool:
  """Return whether the source code of a builder mentions TensorFlow."""
  return bool(re.search(r'\btf\.\w', inspect.getsource(inspect.getmodule(type(builder)))))


def _check_manual_files(name: str, builder, root: Path):
  """Check that the manual downloads exist, if the dataset has any.

  Some datasets may only be downloaded by a person who agrees to their terms.

  Raises UserError with TFDS's instructions.
  """
  manual = root / 'downloads' / 'manual'
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
    instructions = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    raise UserError(f'tfds:{name} must be downloaded by hand into {manual}: {instructions}')


def _describe_source(name: str, dir: str) -> SourceRow:
  try:
    source = open_source(name, 'all', dir=dir)
  except UserError as error:
    return SourceRow(name, '', '', str(error))
  examples = ', '.join(f'{split} {count:,}' for split, count in source.split_sizes.items())
  return SourceRow(name, examples, f'{source.classes:,} classes', '')
