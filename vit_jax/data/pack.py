"""Pack a source into ArrayRecord shards (records.py), in parallel and with constant memory.

One shard is written at a time. Threads read and re-encode its images ahead, and their order is that
of the source, so the files are the same for any number of threads. A shard is written under another
name, synced, and then renamed. Its entry of the manifest is written before that, so a killed
packing continues with the first shard that lacks its name, its entry or its size. manifest.json
is written last.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm

from vit_jax.data.decode import BadImageError
from vit_jax.data.fingerprint import checksum_samples
from vit_jax.data.records import (
  MANIFEST,
  UNFINISHED,
  Manifest,
  PackedFile,
  PackedSplit,
  encode_record,
  encode_unreadable_record,
  file_size,
  is_unreadable_record,
  read_manifest,
)
from vit_jax.data.reencode import describe_reencoding, reencode_image
from vit_jax.data.sources import Source, open_source, open_unlabelled
from vit_jax.errors import UserError, one_line
from vit_jax.runtime.files import read_json_object, sync_folder, write_atomically

PLAN = 'plan.json'  # The splits and numbers of shards of an unfinished packing.
SHARD_BYTES = 2**29  # Of a shard, if the number of shards is not given.
SIZE_SAMPLES = 64  # Examples that are read to estimate the size of a split.
CHUNK = 4  # Examples that a thread takes at a time.
CHUNKS_AHEAD = 2  # For each thread. With CHUNK it bounds the memory.
# Larger groups slow random access. The images are compressed already.
WRITER_OPTIONS = 'group_size:1,uncompressed'
MIN_IMAGES_WITH_PROGRESS_BAR = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
  """Options of a packing."""

  splits: tuple[str, ...] = ()  # NAME or NAME=SPLIT; () means all splits of the source.
  shards: int = 0  # The number for each split; 0 means shards of about SHARD_BYTES.
  reencode: tuple[int, int] | None = None  # (Short side in pixels, JPEG quality).
  keep_unreadable: bool = False  # Write a record that is a bad image, instead of ending.
  threads: int = 0  # That read; 0 means one more than there are CPUs.


class _Split(NamedTuple):
  """A split to pack."""

  name: str
  spec: str  # The split of the source.
  source: Source
  facts: list[str]  # What must not change while the split is packed.


class _Shard(NamedTuple):
  """Examples [start, stop) of a split, and the name of their file."""

  split: _Split
  file: str
  start: int
  stop: int


def pack_source(name: str, folder: Path, options: PackOptions, *, dir: str = '') -> Manifest:
  """Pack splits of a source into `folder`, or continue what a killed process began there.

  Args:
    name: The source. It may be images:PATH, which has no labels.
    folder: The directory to write; it is made.
    options: What to write.
    dir: The directory of TFDS datasets.

  Raises UserError if the source or `folder` does not fit, if an image cannot be read, or if the
  files cannot be written.
  """
  if re.match(r'\w+:/', str(folder)):
    raise UserError(f'{folder}: expected a directory; pack into one, then upload or mount it')
  splits = _open_splits(name, options.splits, dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _check_is_ours(folder)
    with _lock(folder):
      return _find_packed(splits, folder, options) or _pack(splits, folder, options)
  except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError if the disk is full.
    raise UserError(f'cannot pack into {folder}: {one_line(error)}') from error


def _open_splits(name: str, specs: tuple[str, ...], dir: str) -> list[_Split]:
  """Open NAME or NAME=SPLIT, or all splits of the source."""
  open_split = open_unlabelled if name.startswith('images:') else open_source
  if not specs:
    specs = tuple(open_split(name, 'all', dir=dir).split_sizes)
  splits = {}
  for key, _, spec in (spec.partition('=') for spec in specs):
    if not key.replace('_', '').isalnum():
      raise UserError(
        f'--split {key}: expected the name of a split, or NAME=SPLIT for a part of one, such as '
        "'train=train[:90%]'"
      )
    if key in splits:
      raise UserError(f'--split {key} is given twice')
    spec, source = spec or key, open_split(name, spec or key, dir=dir)
    facts = [spec, source.index_checksum(), checksum_samples(source)]
    splits[key] = _Split(key, spec, source, facts)
  return list(splits.values())


def _find_packed(splits: list[_Split], folder: Path, options: PackOptions) -> Manifest | None:
  """Return the manifest if `folder` is packed to the end, or None.

  If a file is missing or has another size, `folder` becomes an unfinished packing of the others.

  Raises UserError if it was packed with other options.
  """
  if not (folder / MANIFEST).exists():
    return None
  manifest = read_manifest(folder)
  files = [file for split in manifest.splits.values() for file in (*split.shards, split.labels)]
  is_whole = all(file_size(folder / file.file) == file.bytes for file in files if file)
  if is_whole:
    shutil.rmtree(folder / UNFINISHED)
  found = {
    'source_kind': manifest.source_kind,
    'reencode': manifest.reencode,
    'splits': {key: [x.spec, x.listing, x.content] for key, x in manifest.splits.items()},
  }
  counts = {key: len(split.shards) for key, split in manifest.splits.items()}
  _check_same(found, counts, splits, options, folder)
  if is_whole:
    return manifest
  for file in files:
    if file:
      _write_note(folder, file)
  plan = _describe_task(splits, options) | {'shards': counts}
  write_atomically(folder / UNFINISHED / PLAN, json.dumps(plan))
  (folder / MANIFEST).unlink()
  return None


def _pack(splits: list[_Split], folder: Path, options: PackOptions) -> Manifest:
  """Write the shards that are missing in `folder`, then the manifest."""
  counts = _plan_shards(splits, folder, options)
  shards = [shard for split in splits for shard in _list_shards(split, counts[split.name])]
  for left in folder.glob('incomplete.*'):
    left.unlink()
  total = sum(len(split.source) for split in splits)
  bar = tqdm.tqdm(
    total=total,
    unit='image',
    dynamic_ncols=True,
    disable=total < MIN_IMAGES_WITH_PROGRESS_BAR or not sys.stderr.isatty(),
  )
  with concurrent.futures.ThreadPoolExecutor(_count_threads(options)) as pool, bar:
    for shard in shards:
      if _is_done(folder, shard):
        bar.update(shard.stop - shard.start)
      else:
        _write_shard(folder, shard, _read_records(shard, options, pool), bar.update)
  source = splits[0].source
  manifest = Manifest(
    source=source.title,
    source_kind=source.kind,
    label_names=source.label_names,
    reencode=describe_reencoding(options.reencode),
    splits={
      split.name: _describe_split(split, folder, [each for each in shards if each.split is split])
      for split in splits
    },
  )
  write_atomically(folder / MANIFEST, manifest.to_json() + '\n')
  sync_folder(folder)
  shutil.rmtree(folder / UNFINISHED)
  return manifest


def _describe_task(splits: list[_Split], options: PackOptions) -> dict[str, object]:
  """Return what must be the same when an unfinished packing continues."""
  return {
    'source_kind': splits[0].source.kind,
    'reencode': describe_reencoding(options.reencode),
    'splits': {split.name: split.facts for split in splits},
  }


def _check_is_ours(folder: Path):
  """Raise UserError if a directory has files, but none of packed data."""
  is_ours = (folder / MANIFEST).exists() or (folder / UNFINISHED).exists()
  if not is_ours and any(folder.iterdir()):
    raise UserError(f'{folder} is not empty; give an empty or a new directory as --to')


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
  """Keep other processes from packing into `folder`. The kernel releases the lock of a process."""
  (folder / UNFINISHED).mkdir(exist_ok=True)
  with (folder / UNFINISHED / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another process is packing into {folder}; wait until it ends') from None
    except OSError:
      pass  # The file system has no locks.
    yield


def _plan_shards(splits: list[_Split], folder: Path, options: PackOptions) -> dict[str, int]:
  """Return the number of shards of each split: that of an unfinished packing, or a new one."""
  path = folder / UNFINISHED / PLAN
  if path.exists():
    plan = read_json_object(path)
    _check_same(plan, plan['shards'], splits, options, folder)
    return plan['shards']
  counts = {
    split.name: min(len(split.source), options.shards or _estimate_shards(split.source, options))
    for split in splits
  }
  write_atomically(path, json.dumps(_describe_task(splits, options) | {'shards': counts}))
  return counts


def _check_same(
  found: dict, counts: dict, splits: list[_Split], options: PackOptions, folder: Path
):
  """Raise UserError if `folder` has packed data that differs from what is to be packed."""
  names = {
    'source_kind': 'another kind of source',
    'reencode': 'another --reencode',
    'splits': 'other splits, or the source has changed since',
  }
  task = _describe_task(splits, options)
  for key, facts in found['splits'].items():  # Older packings do not state the content.
    if key in task['splits'] and facts[2:] in ([], ['']):
      found['splits'][key] = facts[:2] + task['splits'][key][2:]
  differences = [text for key, text in names.items() if found.get(key) != task[key]]
  shards = {split.name: min(len(split.source), options.shards) for split in splits}
  if options.shards and not differences and counts != shards:
    differences = [f'{max(counts.values())} shards']
  if differences:
    raise UserError(
      f'{folder} was packed with {differences[0]}; remove it, or give another directory as --to'
    )


def _estimate_shards(source: Source, options: PackOptions) -> int:
  samples = source.subsample(SIZE_SAMPLES)
  size = sum(len(_make_record(samples, i, options)) for i in range(len(samples)))
  return max(1, round(size / len(samples) * len(source) / SHARD_BYTES))


def _list_shards(split: _Split, count: int) -> Iterator[_Shard]:
  n = len(split.source)
  for k in range(count):
    file = f'{split.name}-{k:05d}-of-{count:05d}.array_record'
    yield _Shard(split, file, n * k // count, n * (k + 1) // count)


def _read_records(
  shard: _Shard, options: PackOptions, pool: concurrent.futures.Executor
) -> Iterator[bytes]:
  """Yield the records of a shard in order. Threads make some ahead."""

  def make_chunk(first: int) -> list[bytes]:
    indices = range(first, min(first + CHUNK, shard.stop))
    return [_make_record(shard.split.source, i, options) for i in indices]

  waiting, limit = collections.deque(), CHUNKS_AHEAD * _count_threads(options)
  try:
    for first in range(shard.start, shard.stop, CHUNK):
      waiting.append(pool.submit(make_chunk, first))
      if len(waiting) == limit:
        yield from waiting.popleft().result()
    while waiting:
      yield from waiting.popleft().result()
  finally:
    for each in waiting:
      each.cancel()


def _make_record(source: Source, i: int, options: PackOptions) -> bytes:
  try:
    data, labels, name = source[i]
  except BadImageError as error:
    name, reason = error.args
    if not options.keep_unreadable:
      raise UserError(
        f'{name}: {reason}. Replace or remove it, or pack it as a record that counts as '
        'unreadable with --bad_images=keep'
      ) from None
    return encode_unreadable_record((), shorten_name(name, source.title), reason)
  if options.reencode:
    data = reencode_image(data, name, *options.reencode, user_file=source.is_user_file(i))
  return encode_record(data, labels, shorten_name(name, source.title))


def shorten_name(name: str, title: str) -> str:
  """Return the name of an example without the directory of its source.

  The files of packed data then do not depend on where the source is.
  """
  path = title.partition(':')[2]
  for folder in (path, os.path.dirname(path)):  # noqa: PTH120
    prefix = os.path.join(Path(os.path.expanduser(folder)), '')  # noqa: PTH111, PTH118
    if folder and name.startswith(prefix):
      return name[len(prefix) :]
  return name


def _write_shard(
  folder: Path, shard: _Shard, records: Iterator[bytes], count_record: Callable[[], object]
):
  """Write a shard, what the manifest will say about it, and give the shard its final name."""
  from array_record.python.array_record_module import ArrayRecordWriter

  unfinished = folder / f'incomplete.{shard.file}'
  unreadable = 0
  try:
    writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
    for record in records:
      writer.write(record)
      unreadable += is_unreadable_record(record)
      count_record()
    writer.close()
    facts = _describe_file(unfinished, shard.file, shard.stop - shard.start)
    _write_note(folder, dataclasses.replace(facts, unreadable=unreadable))
    unfinished.rename(folder / shard.file)
    sync_folder(folder)
  finally:
    unfinished.unlink(missing_ok=True)


def _write_note(folder: Path, file: PackedFile):
  """Write what the manifest will say about a file."""
  note = folder / UNFINISHED / f'{file.file}.json'
  write_atomically(note, json.dumps(dataclasses.asdict(file)))
  sync_folder(note.parent)


def _is_done(folder: Path, shard: _Shard) -> bool:
  """Return whether a shard has its final name, its note, and the size in the note."""
  try:
    note = PackedFile(**read_json_object(folder / UNFINISHED / f'{shard.file}.json'))
  except (OSError, TypeError, UserError):
    return False
  return note.examples == shard.stop - shard.start and file_size(folder / note.file) == note.bytes


def _describe_file(path: Path, name: str, examples: int) -> PackedFile:
  """Sync a file to the disk and return its facts."""
  with path.open('rb') as file:
    os.fsync(file.fileno())
    checksum = hashlib.file_digest(file, 'sha256').hexdigest()
    return PackedFile(name, examples, os.fstat(file.fileno()).st_size, checksum)


def _describe_split(split: _Split, folder: Path, shards: list[_Shard]) -> PackedSplit:
  """Write the labels of a split, if the source lists them, and return its part of the manifest."""
  labels, table = None, split.source.read_labels()
  if table is not None:
    path = folder / f'{split.name}-labels.npy'
    with path.open('wb') as file:
      np.save(file, table.astype(np.int32))
    labels = _describe_file(path, path.name, len(table))
  notes = [read_json_object(folder / UNFINISHED / f'{shard.file}.json') for shard in shards]
  spec, listing, content = split.facts
  return PackedSplit(
    spec=spec,
    listing=listing,
    content=content,
    max_labels=split.source.max_labels,
    shards=tuple(PackedFile(**note) for note in notes),
    labels=labels,
  )


def _count_threads(options: PackOptions) -> int:
  cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return options.threads or 1 + cpus
