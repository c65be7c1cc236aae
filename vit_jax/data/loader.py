"""Batches for training and evaluation.

Batch `k` is a pure function of (data config, seed, `k`). It does not depend on the number of
hosts, workers or threads, nor on the step at which the run started.

A source has `len(source)`, `source[i] -> (bytes | pixels, labels, name)`, `label_names`, `classes`,
`max_labels` and `split`, and can be pickled. `source.is_user_file(i)`, if there is such a method,
says that example `i` is a file of the user, which is decoded with other defaults. A batch holds
this host's contiguous slice of the global batch:

  'image'   uint8 [b, h, w, channels]
  'label'   int32 [b, max_labels], padded with -1; float32 [b, k] class probabilities of a mixture
  'mask'    bool [b], False in rows without an example
  'id'      int64 [b], the index of the example in the source

A row has no example after the end of the evaluation data (its id is -1) or if image i cannot be
read (its id is -1 - i). Its image is zero and its labels are -1, or zero in a mixture.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator

import cv2
import grain
import numpy as np
from absl import flags

from vit_jax.config import DataConfig, ModelConfig
from vit_jax.data.augment import make_augmentation, train_interpolation
from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.data.images import write_eval_image, write_train_image
from vit_jax.data.preprocessing import Preprocessing, decoding_options, eval_preprocessing
from vit_jax.data.sampler import mixture_example, repeated_example, sequential_example
from vit_jax.data.workers import init_worker, start_resource_tracker
from vit_jax.errors import UserError

# Images that a decoding thread takes at a time. Their decoding dwarfs the cost of handing them out.
DECODE_CHUNK = 16
MIN_SHARED_BYTES = 1 << 16  # Smaller arrays of a worker are cheaper to send than to share.
# Batches in progress in each process, so that threads that finish one can start the next.
LOADER_PREFETCH = 2
READ_AHEAD = 2  # Batches after those in progress, whose records in object storage are fetched.

Batch = dict[str, np.ndarray]


def train_batches(
  source,
  config: DataConfig,
  *,
  seed: int,
  start: int,
  host: int,
  hosts: int,
  model: ModelConfig | None = None,
) -> Iterator[Batch]:
  """Yield this host's part of training batches `start`, `start + 1`, … without end.

  Each epoch has its own order. A batch may contain the end of one epoch and the start of the next.
  With `config.repeats`, an epoch has that many copies of a part of the examples.
  Images are RGB, or grey if `model.channels` is 1. None means the default model.

  Raises UserError if `config.batch` is not divisible by `hosts`, or if an image cannot be read and
  `config.bad_images` is not 'skip'.
  """
  batch, model = _local_batch_size('batch', config.batch, hosts), model or ModelConfig()
  copies = {'batch': config.batch, 'repeats': config.repeats}
  locate = functools.partial(repeated_example, examples=len(source), seed=seed, **copies)
  if config.unlabelled:
    locate = functools.partial(
      mixture_example,
      labelled=len(source.labelled),
      unlabelled=len(source.unlabelled),
      ratio=config.unlabelled_ratio,
      seed=seed,
    )
  make_batch = _BatchMaker(
    locate_example=locate,
    write_example=functools.partial(
      _write_train_example,
      source=source,
      config=config,
      seed=seed,
      augment=make_augmentation(config, model),
    ),
    shape=(batch, *config.size, model.channels),
    dtype=np.uint8,
    label_width=source.max_labels,
    soft_labels=bool(config.unlabelled),
    host=host,
    hosts=hosts,
    skip_bad_images=config.bad_images == 'skip',
    threads=_count_threads(config),
    read_ahead=getattr(source, 'read_ahead', None),
  )
  return _iterate_batches(make_batch, range(start, sys.maxsize), config.workers)


def eval_batches(
  source,
  config: DataConfig,
  *,
  host: int,
  hosts: int,
  exact: bool = False,
  steps: Preprocessing | None = None,
) -> Iterator[Batch]:
  """Yield this host's part of the evaluation batches.

  Together the hosts see every example once, in the order of the source. All hosts yield the same
  number of batches.

  Args:
    source: The examples.
    config: The data settings.
    host: Index of this host.
    hosts: Number of hosts.
    exact: Yield unrounded float32 images instead of uint8.
    steps: The preprocessing of images. None means that of `config`.

  Raises UserError if the batch is not divisible by `hosts`, or if an image cannot be read and
  `config.bad_images` is not 'skip'.
  """
  name, size = ('eval_batch', config.eval_batch) if config.eval_batch else ('batch', config.batch)
  batch = _local_batch_size(name, size, hosts)
  steps = steps or eval_preprocessing(config)
  make_batch = _BatchMaker(
    locate_example=functools.partial(sequential_example, examples=len(source)),
    write_example=functools.partial(
      _write_eval_example,
      source=source,
      steps=steps,
      max_pixels=config.max_pixels,
    ),
    shape=(batch, *steps.size, steps.channels),
    dtype=np.float32 if exact else np.uint8,
    label_width=source.max_labels,
    soft_labels=False,
    host=host,
    hosts=hosts,
    skip_bad_images=config.bad_images == 'skip',
    threads=_count_threads(config),
    read_ahead=getattr(source, 'read_ahead', None),
  )
  return _iterate_batches(make_batch, range(math.ceil(len(source) / size)), config.workers)


def diagnose_bad_example(source, index: int, max_pixels: int) -> tuple[str, str]:
  """Read an unreadable example again and return (its name, what is wrong with it).

  A batch records only that an example could not be read.
  """
  try:
    data, _, name = source[index]
    decode_image(data, name=name, max_pixels=max_pixels)
  except BadImageError as error:
    return error.args
  return name, 'it could not be read before, but now it can'


def max_bad_examples(config: DataConfig, examples: int) -> int:
  """Return how many of `examples` may be unreadable before that is an error."""
  return math.ceil(config.max_bad_fraction * examples) if config.bad_images == 'skip' else 0


def _write_train_example(
  epoch: int, index: int, out: np.ndarray, *, source, config: DataConfig, seed: int, augment
) -> tuple[int, ...]:
  """Write the image of an example in one epoch into `out` and return the labels.

  `augment` is from `make_augmentation`.
  """
  data, labels, name = source[index]
  options = decoding_options(config.orient, config.jpeg_dct, user_file=_is_user_file(source, index))
  write_train_image(
    data,
    out,
    name=name,
    key=(seed, epoch, index),
    crop=config.crop,
    area=config.crop_area,
    aspect=config.crop_aspect,
    side=config.resize_before_crop,
    augment=augment,
    flip=config.flip,
    interpolation=train_interpolation(config),
    decoding={'max_pixels': config.max_pixels, **options},
  )
  return labels


def _is_user_file(source, index: int) -> bool:
  return hasattr(source, 'is_user_file') and source.is_user_file(index)


def _write_eval_example(
  epoch: int, index: int, out: np.ndarray, *, source, steps: Preprocessing, max_pixels: int
) -> tuple[int, ...]:
  """Write the evaluation image of an example into `out` and return the labels."""
  del epoch  # Evaluation images are the same in every epoch.
  data, labels, name = source[index]
  write_eval_image(
    data,
    out,
    name=name,
    steps=steps,
    user_file=_is_user_file(source, index),
    max_pixels=max_pixels,
  )
  return labels


@dataclasses.dataclass(kw_only=True)
class _BatchMaker:
  """Makes batch `k`.

  Grain schedules batches instead of examples, so that its overhead per item is paid once a batch.
  """

  # Position in the stream -> (epoch, example); example is -1 if there is none.
  locate_example: Callable[[int], tuple[int, int]]
  # (epoch, example, image to write) -> labels.
  write_example: Callable[[int, int, np.ndarray], tuple[int, ...]]
  shape: tuple[int, ...]  # This host's images: [b, h, w, c].
  dtype: type
  label_width: int
  soft_labels: bool  # Labels are class probabilities.
  host: int
  hosts: int
  skip_bad_images: bool
  threads: int
  read_ahead: Callable[[Iterable[int]], None] | None  # Given examples that are needed soon.
  stride: int = 1  # Batch k + stride is this process's next batch.

  def __call__(self, k: int) -> Batch | UserError:
    b = self.shape[0]
    labels = (b, self.label_width)
    out = {
      'image': self._allocate_images(),
      'label': np.zeros(labels, np.float32) if self.soft_labels else np.full(labels, -1, np.int32),
      'mask': np.ones(b, bool),
      'id': np.empty(b, np.int64),
    }
    first = (k * self.hosts + self.host) * b
    try:
      for step in range(READ_AHEAD + 1) if self.read_ahead else ():
        self.read_ahead(self._list_examples(k + step * self.stride))
      chunks = [
        self._pool.submit(self._fill_rows, out, first, range(i, min(i + DECODE_CHUNK, b)))
        for i in range(0, b, DECODE_CHUNK)
      ]
      for chunk in chunks:
        chunk.result()
    except UserError as error:
      return error  # Raising it in a worker process would change its type and message.
    return out

  def _list_examples(self, k: int) -> Iterator[int]:
    """Yield the examples of batch `k`."""
    b = self.shape[0]
    first = (k * self.hosts + self.host) * b
    located = (self.locate_example(position)[1] for position in range(first, first + b))
    return (index for index in located if index >= 0)

  def _allocate_images(self) -> np.ndarray:
    """Reuse the memory of an earlier batch that nothing references any more.

    Faulting in fresh pages costs as much as resizing.
    """
    try:
      memory = self._free_buffers.pop()
    except IndexError:
      memory = bytearray(math.prod(self.shape) * np.dtype(self.dtype).itemsize)
    out = np.frombuffer(memory, self.dtype).reshape(self.shape)
    # Every view of the batch, and every jax.Array that shares its memory, keeps `out.base` alive.
    weakref.finalize(out.base, self._free_buffers.append, memory).atexit = False
    return out

  def _fill_rows(self, out: Batch, first: int, rows: range):
    for row in rows:
      epoch, index = self.locate_example(first + row)
      labels, out['id'][row] = self._write_or_skip(epoch, index, out['image'][row]), index
      if labels is None:
        out['image'][row] = 0
        out['mask'][row] = False
        out['id'][row] = ~index if index >= 0 else -1
      else:
        out['label'][row, : len(labels)] = labels

  def _write_or_skip(self, epoch: int, index: int, image: np.ndarray) -> tuple[int, ...] | None:
    try:
      return None if index < 0 else self.write_example(epoch, index, image)
    except BadImageError:
      if self.skip_bad_images:
        return None
      raise

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    cv2.setNumThreads(0)  # The images already run in parallel.
    return concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix='decode')

  @functools.cached_property
  def _free_buffers(self) -> collections.deque[bytearray]:
    return collections.deque(maxlen=LOADER_PREFETCH)

  def __getstate__(self):
    per_process = ('_pool', '_free_buffers')
    return {name: value for name, value in self.__dict__.items() if name not in per_process}


def _count_threads(config: DataConfig) -> int:
  """Return the number of decoding threads per process.

  The default is one more than its share of the CPUs, because one thread waits for a file.
  """
  return config.threads or 1 + _count_cpus() // max(1, config.workers)


def _count_cpus() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _local_batch_size(name: str, batch: int, hosts: int) -> int:
  if batch % hosts:
    below = batch - batch % hosts
    use = f'{below} or {below + hosts}' if below else hosts
    raise UserError(f'config.data.{name}={batch} is not divisible by {hosts} hosts; use {use}')
  return batch // hosts


def _iterate_batches(make_batch: _BatchMaker, batches: range, workers: int) -> Iterator[Batch]:
  """Yield the batches in order, made ahead by threads of this process or by worker processes."""
  make_batch = dataclasses.replace(make_batch, stride=max(1, workers))
  dataset = grain.MapDataset.range(batches.start, batches.stop).map(make_batch)
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=LOADER_PREFETCH, prefetch_buffer_size=LOADER_PREFETCH)
  )
  options = grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES)
  dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only absl applications parse.
    start_resource_tracker()
    options = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=LOADER_PREFETCH
    )
    dataset = dataset.mp_prefetch(options, worker_init_fn=init_worker)
  holder = [iter(dataset)]
  iterator = _yield_batches(holder)
  # If the program ends before the loop does, Grain's own cleanup would run too late.
  weakref.finalize(iterator, _close_iterator, holder)
  return iterator


def _yield_batches(holder: list) -> Iterator[Batch]:
  """Yield the batches of the Grain iterator in `holder`.

  `holder` has the only reference, so `_close_iterator` can free the iterator at any time.
  """
  try:
    while holder and (batch := next(holder[0], None)) is not None:
      if isinstance(batch, UserError):
        raise batch
      yield batch
  finally:
    _close_iterator(holder)


def _close_iterator(holder: list):
  """Stop the worker processes and free shared memory."""
  if holder:
    holder.pop().close()
