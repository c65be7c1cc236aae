"""Batches. Batch `k` is a pure function of (data config, seed, `k`): not of hosts, workers, threads or the start.

A source has `len`, `source[i] -> (bytes | pixels, labels, name)`, `label_names`, `classes`, `most_labels` and `split`,
and can be pickled. A batch is {'image': uint8 [b, h, w, 3], 'label': int32 [b, most_labels] (-1 where an example has
fewer), 'mask': bool [b], 'id': int64 [b], the examples' numbers in the source}: this host's contiguous slice of the global
batch. Of a mixture (mixture.py) 'label' is float32 [b, classes]: the probability of each class.

Where the mask is False there is no example (the last evaluation batch is filled up; the id is -1) or none that can be
read (the id of example i is then ~i): zeros, and labels that are none.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import cv2
import grain
import numpy as np
from absl import flags

from vit_jax.config import DataConfig
from vit_jax.data import images
from vit_jax.data.order import mixture_example, sequential_example, shuffled_example
from vit_jax.errors import UserError

DECODE_CHUNK = 16  # Images that a decoding thread takes at a time: what handing them out costs is lost in what they cost.
MIN_SHARED_BYTES = 1 << 16  # Bytes: smaller arrays of a worker are cheaper to send than to share.
LOADER_PREFETCH = 2  # Batches in the making at a time, in each process: threads that have ended one go on with the next.

Batch = dict[str, np.ndarray]


def train_batches(
  source, config: DataConfig, *, seed: int, start: int, host: int, hosts: int
) -> Iterator[Batch]:
  """Batches `start`, `start + 1`, … without end. They run on over the end of an epoch; each epoch has its own order."""
  batch = _local_batch_size(config.batch, 'batch', hosts)
  example = functools.partial(_train_example, source=source, config=config, seed=seed)
  sizes = {'batch': batch, 'host': host, 'hosts': hosts}
  if not config.unlabelled:
    order = functools.partial(shuffled_example, examples=len(source), seed=seed)
    return _iterate_batches(order, example, range(start, sys.maxsize), source, config, **sizes)
  counts = {'labelled': len(source.labelled), 'unlabelled': len(source.unlabelled)}
  order = functools.partial(mixture_example, **counts, ratio=config.unlabelled_ratio, seed=seed)
  return _iterate_batches(
    order, example, range(start, sys.maxsize), source, config, **sizes, soft=True
  )


def eval_batches(
  source, config: DataConfig, *, host: int, hosts: int, exact: bool = False
) -> Iterator[Batch]:
  """Every example once over all hosts, in the source's order; as many batches on each. `exact`: unrounded float32."""
  name = 'eval_batch' if config.eval_batch else 'batch'
  batch = _local_batch_size(getattr(config, name), name, hosts)
  order = functools.partial(sequential_example, examples=len(source))
  example = functools.partial(_eval_example, source=source, config=config)
  count = -(-len(source) // (batch * hosts))
  dtype = np.float32 if exact else np.uint8
  return _iterate_batches(
    order, example, range(count), source, config, batch=batch, host=host, hosts=hosts, dtype=dtype
  )


def diagnose_bad_example(source, index: int, max_pixels: int) -> tuple[str, str]:
  """(the name of an example, what is wrong with it), found out again: a batch only says that something is."""
  try:
    data, _, name = source[index]
    images.decode_image(data, name=name, max_pixels=max_pixels)
  except images.BadImageError as error:
    return error.args
  return name, 'it could not be read a moment ago'


def max_bad_examples(config: DataConfig, examples: int) -> int:
  """Of so many examples, those that may be unreadable before it is an error."""
  return math.ceil(config.max_bad_fraction * examples) if config.bad_images == 'skip' else 0


def _train_example(
  epoch: int, index: int, out: np.ndarray, *, source, config: DataConfig, seed: int
) -> tuple[int, ...]:
  """Writes the image of an example, as an epoch sees it, into `out`; returns its labels."""
  data, labels, name = source[index]
  images.write_train_image(
    data,
    out,
    name=name,
    key=(seed, epoch, index),
    crop=config.crop,
    area=config.crop_area,
    aspect=config.crop_aspect,
    side=config.resize_before_crop,
    operations=config.randaug_ops,
    magnitude=config.randaug_magnitude,
    flip=config.flip,
    max_pixels=config.max_pixels,
  )
  return labels


def _eval_example(
  epoch: int, index: int, out: np.ndarray, *, source, config: DataConfig
) -> tuple[int, ...]:
  """As `_train_example`, for evaluation: every epoch sees the same."""
  del epoch
  data, labels, name = source[index]
  short_side = config.eval_short_side
  images.write_eval_image(
    data, out, name=name, crop=config.eval_crop, short_side=short_side, max_pixels=config.max_pixels
  )
  return labels


@dataclasses.dataclass(kw_only=True)
class _BatchMaker:
  """Makes batch `k`. This, and not a record, is what Grain schedules: its cost for each item is paid once a batch."""

  order: Callable[
    [int], tuple[int, int]
  ]  # A position of the stream -> (epoch, example), -1 where there is none.
  example: Callable[
    [int, int, np.ndarray], tuple[int, ...]
  ]  # (epoch, example, image to write) -> labels.
  shape: tuple[int, ...]  # Of this host's images: [b, h, w, c].
  dtype: type
  labels: int
  soft: bool  # Labels are a probability of each class.
  host: int
  hosts: int
  skip: bool  # Bad images, instead of failing.
  threads: int

  def __call__(self, k: int) -> Batch | UserError:
    b = self.shape[0]
    out = {
      'image': self._images(),
      'label': np.zeros((b, self.labels), np.float32)
      if self.soft
      else np.full((b, self.labels), -1, np.int32),
      'mask': np.ones(b, bool),
      'id': np.empty(b, np.int64),
    }
    first = (k * self.hosts + self.host) * b
    pieces = [
      self._pool.submit(self._fill, out, first, range(i, min(i + DECODE_CHUNK, b)))
      for i in range(0, b, DECODE_CHUNK)
    ]
    try:
      for piece in pieces:
        piece.result()
    except (
      UserError
    ) as error:  # As a value, so that it comes out of a worker process as it went in.
      return error
    return out

  def _images(self) -> np.ndarray:
    """In memory of an earlier batch that nobody holds any more: fresh pages cost as much as resizing."""
    try:
      memory = self._spare.pop()
    except IndexError:
      memory = bytearray(math.prod(self.shape) * np.dtype(self.dtype).itemsize)
    out = np.frombuffer(memory, self.dtype).reshape(self.shape)
    # Every view of the batch, and every jax.Array that shares its memory, keeps `out.base` alive.
    weakref.finalize(out.base, self._spare.append, memory).atexit = False
    return out

  def _fill(self, out: Batch, first: int, rows: range):
    for row in rows:
      epoch, index = self.order(first + row)
      labels, out['id'][row] = self._labels(epoch, index, out['image'][row]), index
      if labels is None:
        out['image'][row] = 0
        out['mask'][row] = False
        out['id'][row] = ~index if index >= 0 else -1
      else:
        out['label'][row, : len(labels)] = labels

  def _labels(self, epoch: int, index: int, image: np.ndarray) -> tuple[int, ...] | None:
    try:
      return None if index < 0 else self.example(epoch, index, image)
    except images.BadImageError:
      if self.skip:
        return None
      raise

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    cv2.setNumThreads(0)  # The parallelism is over images.
    return concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix='decode')

  @functools.cached_property
  def _spare(self) -> collections.deque[bytearray]:
    return collections.deque(maxlen=LOADER_PREFETCH)

  def __getstate__(self):
    return {name: value for name, value in self.__dict__.items() if name not in ('_pool', '_spare')}


def _count_cpus() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _local_batch_size(batch: int, name: str, hosts: int) -> int:
  if batch % hosts:
    raise UserError(f'config.data.{name}={batch} does not divide among {hosts} hosts')
  return batch // hosts


def _iterate_batches(
  order,
  example,
  batches: range,
  source,
  config: DataConfig,
  *,
  batch: int,
  host: int,
  hosts: int,
  dtype: type = np.uint8,
  soft: bool = False,
) -> Iterator[Batch]:
  """The batches in order, made ahead by threads of this process or by worker processes."""
  make = _BatchMaker(
    order=order,
    example=example,
    shape=(batch, *config.size, 3),
    dtype=dtype,
    labels=source.most_labels,
    soft=soft,
    host=host,
    hosts=hosts,
    skip=config.bad_images == 'skip',
    threads=config.threads or 1 + _count_cpus() // max(1, config.workers),  # One waits for a file.
  )
  dataset = grain.MapDataset.range(batches.start, batches.stop).map(make)
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=LOADER_PREFETCH, prefetch_buffer_size=LOADER_PREFETCH)
  )
  options = grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES)
  dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
  if config.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, and its user need not be an absl application.
    _start_resource_tracker()
    options = grain.MultiprocessingOptions(
      num_workers=config.workers, per_worker_buffer_size=LOADER_PREFETCH
    )
    dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
  held = [iter(dataset)]
  drained = _yield_batches(held)
  weakref.finalize(
    drained, _close_iterator, held
  )  # Where the program ends before the loop does, Grain would be too late.
  return drained


def _yield_batches(held: list) -> Iterator[Batch]:
  """The batches of the one Grain iterator in `held`. Nothing else holds it, so that it goes when `_close_iterator` says so."""
  try:
    while held and (batch := next(held[0], None)) is not None:
      if isinstance(batch, UserError):
        raise batch
      yield batch
  finally:
    _close_iterator(held)


def _close_iterator(held: list):
  """Ends workers and frees shared memory."""
  if held:
    held.pop().close()


def _start_resource_tracker():
  """Of shared memory. Its start unblocks signals in this thread; workers are to be born with those blocked that are blocked."""
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
  resource_tracker.ensure_running()
  signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init_worker(worker: int, workers: int):
  """A worker ends when its parent says so, or has ended: Ctrl-C at the terminal and a preemption are the parent's to answer."""
  del worker, workers
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
  """Else a worker of a process that was killed would wait for ever, and keep its memory."""
  multiprocessing.parent_process().join()
  os._exit(0)
