"""Check packed data (records.py): checksums, counts, and that samples decode."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.data.records import (
  MANIFEST,
  PackedFile,
  PackedSplit,
  check_sizes,
  decode_record,
  is_unreadable_record,
  read_label_table,
  read_manifest,
)
from vit_jax.errors import UserError, one_line

SAMPLES = 3  # Records of each shard that are decoded: the first, the middle one and the last.
# ArrayRecord documents no error types. The last two are of a header that is no JSON.
READ_ERRORS = (RuntimeError, IndexError, struct.error, ValueError)


class FileCheck(NamedTuple):
  """A file of packed data, and what is known of it."""

  file: str
  details: str  # What is wrong with it, if it is not good.
  is_good: bool
  bad_images: tuple[str, ...] = ()  # Samples that do not decode, in a good file.


def verify_records(folder: Path) -> Iterator[FileCheck]:
  """Yield a check of each file of packed data. Raises UserError if it has no manifest."""
  manifest = read_manifest(folder)
  classes = len(manifest.label_names)
  yield FileCheck(MANIFEST, f'{classes:,} classes, packed from {manifest.source}', True)
  for split in manifest.splits.values():
    if split.labels:
      yield _check(folder, split.labels, partial(_check_labels, folder, split, classes))
    for shard in split.shards:
      yield _check(folder, shard, partial(_check_samples, folder, shard, classes))


def _check(
  folder: Path, file: PackedFile, check_content: Callable[[], tuple[str, ...]]
) -> FileCheck:
  try:
    check_sizes(folder, (file,))
    with (folder / file.file).open('rb') as content:
      checksum = hashlib.file_digest(content, 'sha256').hexdigest()
    if checksum != file.sha256:
      raise UserError(f'its checksum is {checksum}, but the manifest lists {file.sha256}')
    bad_images = check_content()
  except (UserError, OSError) as error:
    return FileCheck(file.file, str(error), False)
  return FileCheck(file.file, f'{file.examples:,} examples, {file.bytes:,} bytes', True, bad_images)


def _check_labels(folder: Path, split: PackedSplit, classes: int) -> tuple[str, ...]:
  """Raise UserError unless the labels of a split fit the manifest. They have no images."""
  read_label_table(folder, split, classes)
  return ()


def _check_samples(folder: Path, shard: PackedFile, classes: int) -> tuple[str, ...]:
  """Return which samples of a shard do not decode: they were packed so.

  Raises UserError unless the shard has its number of records, and samples of them are valid.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  reader, bad_images = ArrayRecordReader(str(folder / shard.file)), []
  try:
    if (count := reader.num_records()) != shard.examples:
      raise UserError(f'it has {count:,} records, but the manifest lists {shard.examples:,}')
    for i in sorted({int(i) for i in np.linspace(0, count - 1, SAMPLES)}):
      record = reader.read([i])[0]
      if is_unreadable_record(record):
        bad_images.append(f'{shard.file} #{i}: could not be read when it was packed')
        continue
      data, labels, name = decode_record(record, f'{shard.file} #{i}')
      if max(labels, default=0) >= max(1, classes):
        raise UserError(f'{name}: the label {max(labels)} is out of range for {classes} classes')
      try:
        decode_image(data, name=name, max_pixels=DataConfig().max_pixels)
      except BadImageError as error:
        bad_images.append(one_line(error, limit=200))
  except READ_ERRORS as error:
    raise UserError(f'it cannot be read: {one_line(error, limit=200)}') from None
  finally:
    reader.close()
  return tuple(bad_images)
