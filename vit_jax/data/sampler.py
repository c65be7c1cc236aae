"""The order of examples and the random numbers of the data pipeline.

Every function here is pure and answers for any position or key in constant time, so no sampler
state needs to be saved.
"""

import functools
import hashlib
import struct
from collections.abc import Callable

import grain
import numpy as np

# Increase this when `shuffled_example`, `mixture_example` or the rows of a batch change. Runs
# that recorded another version do not resume.
ORDER_VERSION = 1

RandomKey = tuple[int, int, int]  # For a training image: (seed, epoch, example).


def random_bits(key: RandomKey, block: int) -> tuple[int, ...]:
  """Return block number `block` of the random stream of `key`: eight uniform 64-bit integers.

  The stream is a hash of the key and the block number, so every block costs the same.
  """
  return struct.unpack('<8Q', hashlib.blake2b(struct.pack('<4Q', *key, block)).digest())


def keyed_permutation(size: int, key: RandomKey) -> Callable[[int], int]:
  """Return a pseudorandom permutation of [0, size) as a function. It is never written out."""
  seed = random_bits(key, 0)[0] >> 32
  return functools.partial(
    grain.experimental.index_shuffle, max_index=size - 1, seed=seed, rounds=4
  )


def sample_without_replacement(size: int, count: int, key: RandomKey) -> np.ndarray:
  """Return `count` distinct integers from [0, size), int64 [count]."""
  permute = keyed_permutation(size, key)
  return np.fromiter((permute(i) for i in range(count)), np.int64, count)


def shuffled_example(position: int, examples: int, seed: int) -> tuple[int, int]:
  """Return (epoch, example) at a position of the endless training stream."""
  epoch, rank = divmod(position, examples)
  return epoch, keyed_permutation(examples, (seed, epoch, examples))(rank)


def repeated_example(
  position: int, examples: int, seed: int, *, batch: int, repeats: int
) -> tuple[int, int]:
  """Return (draw, example) at a position of a stream with repeated augmentation.

  A batch has `repeats` copies of each of its examples: all first copies, then all second copies,
  and so on. Mixup, which blends neighbors, therefore never blends two copies. An epoch has as many
  images as without repeats, rounded up to full sets of copies: `examples / repeats` examples of its
  permutation.

  `draw` counts the images that were drawn of an example, as the epoch does without repeats. It is
  different for every copy, and so is the augmentation.
  """
  k, row = divmod(position, batch)
  distinct = batch // repeats
  copy, offset = divmod(row, distinct)
  epoch, rank = divmod(k * distinct + offset, -(-examples // repeats))
  return epoch * repeats + copy, keyed_permutation(examples, (seed, epoch, examples))(rank)


def mixture_example(
  position: int, labelled: int, unlabelled: int, ratio: int, seed: int
) -> tuple[int, int]:
  """Return (epoch, example) at a position of the training stream of a mixture.

  Unlabelled examples are numbered after the `labelled` ones. Each kind has its own epochs and
  its own order.

  One position in every group of 1 + `ratio` is labelled: position 0 in the first group, 1 in the
  second, and so on. A device that takes every n-th row of a batch therefore gets both kinds.
  """
  group, offset = divmod(position, 1 + ratio)
  labelled_offset = group % (1 + ratio)
  if offset == labelled_offset:
    return shuffled_example(group, labelled, seed)
  unlabelled_position = group * ratio + offset - (offset > labelled_offset)
  epoch, example = shuffled_example(unlabelled_position, unlabelled, seed)
  return epoch, labelled + example


def sequential_example(position: int, examples: int) -> tuple[int, int]:
  """Return (0, example) at a position of the evaluation stream; example is -1 after the end."""
  return 0, position if position < examples else -1
