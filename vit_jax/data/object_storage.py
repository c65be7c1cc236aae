"""Shards of packed data in object storage, read through fsspec with concurrent requests.

A record is a range of bytes of a shard. The footer of a shard has the positions of its records and
is read when the first of them is needed. The order of the examples is known, so the loader names
those of the next batches (`read_ahead`), and `REQUESTS` threads fetch their ranges. With a latency
of 30 ms they fetch at most 2,000 ranges a second; neighbours are one range.

Records stay in memory until newer ones need their place, at most `MEMORY_BYTES` in a process.
"""

import collections
import concurrent.futures
import errno
import functools
import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vit_jax.data.record_format import (
  BLOCK_BYTES,
  read_chunk_ends,
  read_footer_position,
  read_record,
)
from vit_jax.errors import UserError, one_line
from vit_jax.runtime.files import MAX_TEXT_BYTES, retry_io

REQUESTS = 64  # At a time, in a process.
MEMORY_BYTES = 512 << 20  # Of records that were read ahead.
MAX_BATCHES = 8  # That share the memory: those in progress and those ahead.
MAX_GAP_BYTES = 64 << 10  # Unneeded bytes between records of a request: they cost less than one.
MAX_RANGE_BYTES = 4 << 20  # Of several records that one request fetches.
TAIL_BYTES = 4 * BLOCK_BYTES  # Of a shard; most footers are inside.


class _Record(NamedTuple):
  """A record, and its range in a shard."""

  file: str
  i: int
  start: int
  stop: int

  @property
  def range(self) -> tuple[str, int, int]:
    """(file, start, stop)."""
    return self.file, self.start, self.stop


class ObjectShards:
  """The files of packed data below a URL. Thread-safe and picklable."""

  def __init__(self, url: str):
    self.root = url.rstrip('/')
    self._start()

  def __getstate__(self) -> dict:
    return {'url': self.root}

  def __setstate__(self, state: dict):
    self.__init__(**state)

  def _start(self):
    self._lock, self._index_locks = threading.Lock(), collections.defaultdict(threading.Lock)
    self._ends: dict[str, np.ndarray] = {}
    # (file, record) -> a future of {record: bytes}. Those that were needed last are the last.
    self._fetched: collections.OrderedDict = collections.OrderedDict()
    self._sizes: dict[tuple[str, int], int] = {}
    self._bytes = 0  # The sum of the sizes.

  @functools.cached_property
  def _storage(self):
    """(The file system of fsspec, the path of the directory in it)."""
    import fsspec

    try:
      return fsspec.core.url_to_fs(self.root)
    except (ImportError, ValueError) as error:
      hint = "http:// needs `pip install 'vit-jax[storage]'`, gs:// 'vit-jax[gcp]', s3:// s3fs"
      raise UserError(f'{self.root}: {one_line(error, limit=200)}. {hint}') from None

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(REQUESTS, thread_name_prefix='fetch')

  def read_file(self, file: str, size: int | None = None) -> bytes:
    """Return a small file.

    Raises UserError if it is missing or, with `size`, has another size.
    """
    data = self._fetch(file, None, None)
    if len(data) > MAX_TEXT_BYTES and size is None:
      raise UserError(f'{self.root}/{file} has {len(data):,} bytes, which are too many')
    if size is not None and len(data) != size:
      raise UserError(f'{self.root}/{file} has {len(data):,} bytes; the manifest lists {size:,}')
    return data

  def read_record(self, shard, i: int) -> bytes:
    """Return record `i` of a shard.

    Raises ValueError if it is damaged, UserError if it cannot be fetched.
    """
    self._request([(shard, i)])
    record = self._locate(shard, i)
    with self._lock:
      future = self._fetched.get(record[:2])
    if future is None:  # Others needed its place in the meantime.
      return read_record(self._fetch(*record.range), record.start)
    try:
      data = future.result()[i]
    except UserError:
      self._forget(record)  # A later call tries again.
      raise
    return read_record(data, record.start)

  def read_ahead(self, records: list[tuple[object, int]]):
    """Begin to fetch (shard, record) that are needed soon, as far as they fit into the memory."""
    if not records:
      return
    shards = {shard.file: shard for shard, _ in records}
    mean = max(1, sum(x.bytes for x in shards.values()) // sum(x.examples for x in shards.values()))
    missing = [shard for shard in shards.values() if shard.file not in self._ends]
    for _ in self._pool.map(self._read_index, missing):
      pass
    self._request(records[: MEMORY_BYTES // MAX_BATCHES // mean])

  def _request(self, records: list[tuple[object, int]]):
    """Begin to fetch the records that are neither in memory nor on their way."""
    located = [self._locate(shard, i) for shard, i in dict.fromkeys(records)]
    with self._lock:
      new = [record for record in located if record[:2] not in self._fetched]
      for group in _join_neighbours(new):
        future = self._pool.submit(self._fetch_group, group)
        self._fetched |= {record[:2]: future for record in group}
        self._sizes |= {record[:2]: record.stop - record.start for record in group}
        self._bytes += sum(record.stop - record.start for record in group)
      for record in located:
        self._fetched.move_to_end(record[:2])
      while self._bytes > MEMORY_BYTES and len(self._fetched) > len(located):
        key, _ = self._fetched.popitem(last=False)
        self._bytes -= self._sizes.pop(key)

  def _forget(self, record: _Record):
    with self._lock:
      if self._fetched.pop(record[:2], None):
        self._bytes -= self._sizes.pop(record[:2])

  def _locate(self, shard, i: int) -> _Record:
    ends = self._ends.get(shard.file)
    ends = self._read_index(shard) if ends is None else ends
    return _Record(shard.file, i, int(ends[i]), int(ends[i + 1]))

  def _read_index(self, shard) -> np.ndarray:
    """Return the positions [n + 1] of the records of a shard."""
    with self._lock:
      lock = self._index_locks[shard.file]
    with lock:
      if shard.file not in self._ends:
        self._ends[shard.file] = self._fetch_index(shard)
    return self._ends[shard.file]

  def _fetch_index(self, shard) -> np.ndarray:
    first = max(0, shard.bytes - TAIL_BYTES)
    tail = self._fetch(shard.file, first, shard.bytes)
    try:
      footer = read_footer_position(tail[-BLOCK_BYTES:], shard.bytes)
      if footer < first:
        tail, first = self._fetch(shard.file, footer, first) + tail, footer
      ends = read_chunk_ends(tail[footer - first : -BLOCK_BYTES], footer)
      if len(ends) != shard.examples + 1:
        raise ValueError(f'it has {len(ends) - 1:,} records, not {shard.examples:,}')
    except ValueError as error:
      url = f'{self.root}/{shard.file}'
      raise UserError(f'{url} is not as the manifest says: {error}; copy it again') from None
    return ends

  def _fetch_group(self, group: list[_Record]) -> dict[int, bytes]:
    """Return {number of the record: its bytes} of neighbours, from one request."""
    start = group[0].start
    data = self._fetch(group[0].file, start, group[-1].stop)
    return {each.i: data[each.start - start : each.stop - start] for each in group}

  def _fetch(self, file: str, start: int | None, stop: int | None) -> bytes:
    """Return a range of a file, or all of it. Raises UserError if it is missing or denied."""
    url, (system, root) = f'{self.root}/{file}', self._storage

    def fetch() -> bytes:
      try:
        data = system.cat_file(f'{root}/{file}', start=start, end=stop)
      except FileNotFoundError:
        raise UserError(f'{url} is missing; copy it again') from None
      except PermissionError as error:
        raise UserError(f'{url}: {one_line(error, limit=200) or "permission denied"}') from None
      except Exception as error:  # The libraries behind fsspec raise errors of many types.
        raise OSError(errno.EIO, one_line(error, limit=200) or type(error).__name__) from None
      if stop is not None and len(data) != stop - start:
        raise OSError(errno.EIO, f'{len(data):,} bytes came of {stop - start:,}')
      return data

    return retry_io(f'reading {url}', fetch)


def _join_neighbours(records: Iterable[_Record]) -> list[list[_Record]]:
  """Return groups of records that one request fetches."""
  groups: list[list[_Record]] = []
  for record in sorted(records):
    last = groups[-1] if groups else None
    is_near = last and last[-1].file == record.file
    is_near = is_near and record.start - last[-1].stop <= MAX_GAP_BYTES
    if is_near and record.stop - last[0].start <= MAX_RANGE_BYTES:
      last.append(record)
    else:
      groups.append([record])
  return groups
