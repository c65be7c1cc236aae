"""What each device draws for its own rows is what one device draws for all."""

import jax
import numpy as np
import pytest

from vit_jax.sharding.prng import fold_in_device


def key_at(key: jax.Array, place: int) -> jax.Array:
  return fold_in_device(jax.random.key_data(key), np.uint32(place))


def rows_of(draw, key, places: int) -> np.ndarray:
  """The draws of all places, one under another."""
  return np.concatenate([draw(key_at(key, place)) for place in range(places)])


def murmur(x: np.ndarray) -> np.ndarray:
  """fmix32 of MurmurHash3, in 64-bit integers."""
  x = x.astype(np.uint64)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(2**32 - 1)
  return x


@pytest.mark.parametrize('shape', [(2,), (3, 1, 1), (4, 5, 7), (1, 300, 257)])
@pytest.mark.parametrize('draw', [jax.random.bernoulli, jax.random.normal])
def test_the_rows_of_eight_places_are_those_of_one_draw(shape, draw):
  key = jax.random.fold_in(jax.random.key(3), 7)
  all_rows = (8 * shape[0], *shape[1:])
  np.testing.assert_array_equal(
    rows_of(lambda key: draw(key, shape=shape), key, 8), draw(key_at(key, 0), shape=all_rows)
  )


def test_splitting_and_folding_in_keep_the_place():
  key = jax.random.key(5)
  derive = lambda key: jax.random.fold_in(jax.random.split(key, 3)[1], 9)
  found = rows_of(lambda key: jax.random.uniform(derive(key), (2, 3)), key, 4)
  np.testing.assert_array_equal(found, jax.random.uniform(derive(key_at(key, 0)), (8, 3)))
  assert jax.random.key_data(derive(key_at(key, 3)))[2] == 3
  np.testing.assert_array_equal(
    jax.random.key_data(derive(key_at(key, 3)))[:2], jax.random.key_data(derive(key))
  )


def test_bits_are_two_rounds_of_murmurs_finalizer():
  key = jax.random.key(11)
  k0, k1 = (np.uint64(part) for part in jax.random.key_data(key))
  row, number = np.mgrid[6:9, :20].astype(np.uint64)  # Three rows at place 2.
  expected = murmur(murmur(number ^ k0) ^ murmur(murmur(murmur(row) ^ k1) ^ k0))
  np.testing.assert_array_equal(jax.random.bits(key_at(key, 2), (3, 4, 5)).reshape(3, 20), expected)


def test_bits_are_even_and_neither_rows_places_nor_keys_go_together():
  draw = lambda seed, place: jax.random.bits(key_at(jax.random.key(seed), place), (64, 4096))
  bits = np.concatenate([draw(seed, place) for seed in (0, 1) for place in (0, 1)])  # [256, 4096]
  ones = np.unpackbits(bits.view(np.uint8).reshape(*bits.shape, 4), axis=-1)  # [256, 4096, 32]
  assert (
    abs(ones.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / 1024
  )  # Each bit, to five standard deviations of 2^20 tosses.
  assert abs(ones.mean(axis=(1, 2)) - 0.5).max() < 5 * 0.5 / 2**8.5  # Each row.
  correlations = np.corrcoef(bits.astype(np.float64)) - np.eye(256)
  assert abs(correlations).max() < 6 / 64  # 32,640 pairs of 4,096 numbers.
  collisions = bits.size - np.unique(bits).size
  assert abs(collisions - 2**20 * (2**20 - 1) / 2 / 2**32) < 6 * 128**0.5


def test_rows_beyond_the_first_four_billion_elements_are_drawn_anew():
  """Rows of 2^16 elements: at row 70,000 their numbers among all elements would no longer fit 32 bits."""
  near, far = (
    jax.random.bits(key_at(jax.random.key(0), place), (1, 2**16))
    for place in (70_000 - 2**16, 70_000)
  )
  assert (near != far).mean() > 0.99


def test_more_than_32_bits_are_refused():
  with jax.enable_x64(True), pytest.raises(NotImplementedError, match='64 random bits'):
    jax.random.bits(
      fold_in_device(jax.random.key_data(jax.random.key(0)), np.uint32(0)), (2,), 'uint64'
    )
