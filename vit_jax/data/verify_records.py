"""Check packed data (records.py): checksums, counts, and that samples decode."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.decode import decode_image
from vit_jax.data.records import (
  MANIFEST,
  PackedFile,
  check_sizes,
  decode_record,
  read_label_table,
  read_manifest,
)
from vit_jax.errors import UserError, one_line

SAMPLES = 3  # Records of each shard that are decoded: the first, the middle one and the last.


class FileCheck(NamedTuple):
  """A file of packed data, and what is known of it."""

  file: str
  details: str  # What is wrong with it, if it is not good.
  is_good: bool


def verify_records(folder: Path) -> Iterator[FileCheck]:
  """Yield a check of each file of packed data. Raises UserError if it has no manifest."""
  manifest = read_manifest(folder)
  classes = len(manifest.label_names)
  yield FileCheck(MANIFEST, f'{classes:,} classes, packed from {manifest.source}', True)
  for split in manifest.splits.values():
    if split.labels:
      yield _check(folder, split.labels, partial(read_label_table, folder, split, classes))
    for shard in split.shards:
      yield _check(folder, shard, partial(_check_samples, folder, shard, classes))


def _check(folder: Path, file: PackedFile, check_content: Callable[[], object]) -> FileCheck:
  try:
    check_sizes(folder, (file,))
    with (folder / file.file).open('rb') as content:
      checksum = hashlib.file_digest(content, 'sha256').hexdigest()
    if checksum != file.sha256:
      raise UserError(f'its checksum is {checksum}, but the manifest lists {file.sha256}')
    check_content()
  except (UserError, OSError) as error:
    return FileCheck(file.file, str(error), False)
  return FileCheck(file.file, f'{file.examples:,} examples, {file.bytes:,} bytes', True)


def _check_samples(folder: Path, shard: PackedFile, classes: int):
  """Raise UserError unless a shard has its number of records, and samples of them decode."""
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(folder / shard.file))
  try:
    if (count := reader.num_records()) != shard.examples:
      raise UserError(f'it has {count:,} records, but the manifest lists {shard.examples:,}')
    for i in sorted({int(i) for i in np.linspace(0, count - 1, SAMPLES)}):
      data, labels, name = decode_record(reader.read([i])[0], f'{shard.file} #{i}')
      decode_image(data, name=name, max_pixels=DataConfig().max_pixels)
      if max(labels, default=0) >= max(1, classes):
        raise UserError(f'{name}: the label {max(labels)} is out of range for {classes} classes')
  except (RuntimeError, IndexError) as error:  # ArrayRecord documents no error types.
    raise UserError(f'it cannot be read: {one_line(error, limit=200)}') from None
  finally:
    reader.close()
