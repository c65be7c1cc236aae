"""The order of examples and the random bits are uniform, independent and complete."""

import functools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vit_jax.data.sampler import (
  mixture_example,
  random_bits,
  repeated_example,
  sample_without_replacement,
  sequential_example,
  shuffled_example,
)


def test_random_bits_are_uniform():
  uniform = np.array([random_bits((1, 2, i), 0) for i in range(4000)], np.uint64) / 2**64
  assert uniform.shape == (4000, 8)
  assert np.abs(uniform.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / 4000)
  assert np.abs(np.corrcoef(uniform.T) - np.eye(8)).max() < 5 / math.sqrt(4000)


def test_each_seed_and_epoch_has_another_order():
  order = lambda seed, epoch: tuple(
    shuffled_example(epoch * 500 + i, 500, seed)[1] for i in range(500)
  )
  orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
  assert len(set(orders)) == 9
  assert all(sorted(o) == list(range(500)) for o in orders)
  assert (
    max(
      np.abs(np.corrcoef(orders) - np.eye(9)).max(), abs(np.corrcoef(orders[0], range(500))[0, 1])
    )
    < 0.25
  )


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  examples=st.integers(1, 500), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6)
)
def test_an_epoch_is_a_permutation_for_any_size_seed_and_epoch(examples, seed, epoch):
  order = [shuffled_example(epoch * examples + rank, examples, seed) for rank in range(examples)]
  assert {e for e, _ in order} == {epoch}
  assert sorted(index for _, index in order) == list(range(examples))


@pytest.mark.parametrize('ratio', [1, 3, 14])
def test_one_example_of_each_group_is_labelled_and_each_kind_has_its_own_epochs(ratio):
  stream = [
    mixture_example(position, 60, 140, ratio, seed=5) for position in range(60 * (1 + ratio))
  ]
  labelled = [example for _, example in stream if example < 60]
  assert labelled == [shuffled_example(i, 60, 5)[1] for i in range(60)] and sorted(
    labelled
  ) == list(range(60))
  unlabelled = [(epoch, example - 60) for epoch, example in stream if example >= 60]
  assert unlabelled == [shuffled_example(i, 140, 5) for i in range(60 * ratio)]
  for start in range(0, len(stream), 1 + ratio):
    assert sum(example < 60 for _, example in stream[start : start + 1 + ratio]) == 1
  every_second = [example < 60 for _, example in stream[::2]]
  assert sum(every_second) == pytest.approx(len(every_second) / (1 + ratio), abs=1)


def test_the_order_matches_its_version():
  """A failure means that runs cannot be resumed: increase sampler.ORDER_VERSION."""
  assert [mixture_example(i, 100, 900, 2, 7)[1] for i in range(6)] == [10, 311, 330, 309, 21, 308]


def test_a_sample_without_replacement_has_distinct_members():
  samples = [sample_without_replacement(20, 7, (seed, 0, 20)).tolist() for seed in range(50)]
  assert all(len(set(sample)) == 7 for sample in samples)
  assert {i for sample in samples for i in sample} == set(range(20))


def test_evaluation_is_sequential_and_ends_with_minus_one():
  assert [sequential_example(i, 2) for i in range(4)] == [(0, 0), (0, 1), (0, -1), (0, -1)]


@pytest.mark.parametrize(('examples', 'batch', 'repeats'), [(20, 12, 3), (64, 8, 2), (5, 4, 4)])
def test_a_batch_has_every_example_as_often_as_it_repeats_each_with_another_draw(
  examples, batch, repeats
):
  locate = functools.partial(repeated_example, examples=examples, seed=3, batch=batch)
  count = batch * examples
  stream = [locate(position, repeats=repeats) for position in range(count)]
  assert len(set(stream)) == count  # No example is drawn twice for one key.
  distinct = batch // repeats
  for k in range(0, count, batch):
    copies = np.array(stream[k : k + batch]).reshape(repeats, distinct, 2)
    assert (copies[..., 1] == copies[0, :, 1]).all()  # The same examples, in the same order.
    assert (copies[..., 0] // repeats == copies[0, :, 0] // repeats).all()  # Of one epoch.
    assert (copies[..., 0] % repeats == np.arange(repeats)[:, None]).all()


def test_an_epoch_with_repeats_has_a_part_of_the_examples():
  """DeiT's sampler: as many images as without repeats, of a third of the examples."""
  locate = functools.partial(repeated_example, examples=30, seed=3, batch=6, repeats=3)
  stream = [locate(position) for position in range(90)]
  epochs = [{example for draw, example in stream if draw // 3 == epoch} for epoch in range(3)]
  assert [len(each) for each in epochs] == [10, 10, 10]
  assert len(set.union(*epochs)) > 10  # Each epoch chooses again.


def test_without_repeats_the_stream_is_the_shuffled_one():
  for position in range(100):
    expected = shuffled_example(position, 17, 5)
    assert repeated_example(position, 17, 5, batch=8, repeats=1) == expected
