"""Shards of packed data in a directory. A process has a limited number of them open.

`object_storage.py` has the same for a URL.
"""

import collections
import itertools
import resource
import threading
import weakref
from pathlib import Path

from vit_jax.errors import UserError

SPARE_OPEN_FILES = 256  # Beside the shards, which stay open.
MAX_OPEN_SHARDS = 1 << 16
_READER_OPTIONS = {'options': 'readahead_buffer_size:0', 'file_reader_buffer_size': 1 << 15}


class LocalShards:
  """The files of packed data in a directory. Thread-safe and picklable."""

  def __init__(self, root: Path):
    self.root, self._key = root, _add_owner(self)

  def __getstate__(self) -> dict:
    return {'root': self.root}

  def __setstate__(self, state: dict):
    self.__init__(**state)

  def read_record(self, shard, i: int) -> bytes:
    """Return record `i` of a shard. Raises UserError if the process has too many open files."""
    try:
      return _open_reader(self._key, self.root / shard.file).read([i])[0]
    except RuntimeError as error:
      if 'Too many open files' in str(error):
        raise UserError(f'{self.root}: too many open files; raise `ulimit -n`') from None
      raise


_keys = itertools.count()
_lock = threading.RLock()  # A finalizer may run while this thread has the lock.
_readers: collections.OrderedDict = collections.OrderedDict()  # The last used one is the last.


def _add_owner(shards: LocalShards) -> int:
  """Return a key for the readers of `shards`, which are closed when it is deleted."""
  key = next(_keys)
  weakref.finalize(shards, _close_readers, key).atexit = False
  return key


def _open_reader(owner: int, path: Path):
  """Return the reader of a shard. Close the least recently used one if too many are open."""
  from array_record.python.array_record_module import ArrayRecordReader

  with _lock:
    if reader := _readers.get((owner, path)):
      _readers.move_to_end((owner, path))
      return reader
  reader = ArrayRecordReader(str(path), **_READER_OPTIONS)
  with _lock:
    _readers[owner, path] = reader
    while len(_readers) > count_open_shards():
      _readers.popitem(last=False)  # Closed by the last thread that reads it.
  return reader


def _close_readers(owner: int):
  with _lock:
    for key in [key for key in _readers if key[0] == owner]:
      del _readers[key]


def count_open_shards() -> int:
  """Return how many shards may be open. Raise this process's limit of open files if it can be."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = MAX_OPEN_SHARDS + SPARE_OPEN_FILES
  if soft == resource.RLIM_INFINITY or soft >= wanted:
    return MAX_OPEN_SHARDS
  if hard == resource.RLIM_INFINITY or soft < hard:
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  return max(soft // 2, soft - SPARE_OPEN_FILES, 1)
