"""Which example comes at a position of the stream that batches are cut from: a pure function, of any position at once."""

import grain

from vit_jax.data.images import random_bits

ORDER_VERSION = (
  1  # The version of what `shuffled_example` and a batch's rows are: runs of another do not go on.
)


def shuffled_example(position: int, examples: int, seed: int) -> tuple[int, int]:
  """(epoch, example) at a position of the endless training stream. O(1): a keyed permutation, never written out."""
  epoch, rank = divmod(position, examples)
  key = random_bits((seed, epoch, examples), 0)[0] >> 32
  return epoch, grain.experimental.index_shuffle(rank, max_index=examples - 1, seed=key, rounds=4)


def mixture_example(
  position: int, labelled: int, unlabelled: int, ratio: int, seed: int
) -> tuple[int, int]:
  """As `shuffled_example`, of a mixture, whose unlabelled examples come after its labelled ones; each kind has epochs of its own.

  Of every 1 + `ratio` positions one is labelled: the first, then the second, and so on, so that what takes every second row
  of a batch, too, has some of each.
  """
  group, place = divmod(position, 1 + ratio)
  own = group % (1 + ratio)
  if place == own:
    return shuffled_example(group, labelled, seed)
  epoch, example = shuffled_example(group * ratio + place - (place > own), unlabelled, seed)
  return epoch, labelled + example


def sequential_example(position: int, examples: int) -> tuple[int, int]:
  """(0, example) at a position of the evaluation; behind its end example -1."""
  return 0, position if position < examples else -1
