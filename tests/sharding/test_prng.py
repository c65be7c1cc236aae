"""The draws of each device for its rows equal those rows of a single device's draw."""

import jax
import numpy as np
import pytest

from vit_jax.sharding.prng import fold_in_device


def key_at(key: jax.Array, device_index: int) -> jax.Array:
  return fold_in_device(jax.random.key_data(key), np.uint32(device_index))


def rows_of(draw, key, devices: int) -> np.ndarray:
  """Concatenate the draws of all devices."""
  return np.concatenate([draw(key_at(key, i)) for i in range(devices)])


def murmur(x: np.ndarray) -> np.ndarray:
  """Compute fmix32 of MurmurHash3 in 64-bit integers."""
  x = x.astype(np.uint64)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(2**32 - 1)
  return x


@pytest.mark.parametrize('shape', [(2,), (3, 1, 1), (4, 5, 7), (1, 300, 257)])
@pytest.mark.parametrize('draw', [jax.random.bernoulli, jax.random.normal])
def test_the_rows_of_eight_devices_are_those_of_one_draw(shape, draw):
  key = jax.random.fold_in(jax.random.key(3), 7)
  all_rows = (8 * shape[0], *shape[1:])
  np.testing.assert_array_equal(
    rows_of(lambda key: draw(key, shape=shape), key, 8), draw(key_at(key, 0), shape=all_rows)
  )


def test_split_and_fold_in_keep_the_device_index():
  key = jax.random.key(5)
  derive = lambda key: jax.random.fold_in(jax.random.split(key, 3)[1], 9)
  found = rows_of(lambda key: jax.random.uniform(derive(key), (2, 3)), key, 4)
  np.testing.assert_array_equal(found, jax.random.uniform(derive(key_at(key, 0)), (8, 3)))
  assert jax.random.key_data(derive(key_at(key, 3)))[2] == 3
  np.testing.assert_array_equal(
    jax.random.key_data(derive(key_at(key, 3)))[:2], jax.random.key_data(derive(key))
  )


def test_bits_are_two_rounds_of_the_murmur3_finalizer():
  key = jax.random.key(11)
  k0, k1 = (np.uint64(part) for part in jax.random.key_data(key))
  row, number = np.mgrid[6:9, :20].astype(np.uint64)  # Three rows of device 2.
  expected = murmur(murmur(number ^ k0) ^ murmur(murmur(murmur(row) ^ k1) ^ k0))
  np.testing.assert_array_equal(jax.random.bits(key_at(key, 2), (3, 4, 5)).reshape(3, 20), expected)


def test_bits_are_uniform_and_uncorrelated_over_rows_devices_and_keys():
  draw = lambda seed, i: jax.random.bits(key_at(jax.random.key(seed), i), (64, 4096))
  bits = np.concatenate([draw(seed, i) for seed in (0, 1) for i in (0, 1)])  # [256, 4096]
  ones = np.unpackbits(bits.view(np.uint8).reshape(*bits.shape, 4), axis=-1)  # [256, 4096, 32]
  # Each bit, to five standard deviations of 2^20 coin flips.
  assert abs(ones.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / 1024
  assert abs(ones.mean(axis=(1, 2)) - 0.5).max() < 5 * 0.5 / 2**8.5  # Each row.
  correlations = np.corrcoef(bits.astype(np.float64)) - np.eye(256)
  assert abs(correlations).max() < 6 / 64  # 32,640 pairs of 4,096 numbers.
  collisions = bits.size - np.unique(bits).size
  assert abs(collisions - 2**20 * (2**20 - 1) / 2 / 2**32) < 6 * 128**0.5


def test_rows_beyond_the_first_2_to_the_32_elements_do_not_repeat():
  """With rows of 2^16 elements, flat indices of row 70,000 would overflow 32 bits."""
  near, far = (
    jax.random.bits(key_at(jax.random.key(0), i), (1, 2**16)) for i in (70_000 - 2**16, 70_000)
  )
  assert (near != far).mean() > 0.99


def test_more_than_32_bits_are_an_error():
  with jax.enable_x64(True), pytest.raises(NotImplementedError, match='64'):
    jax.random.bits(
      fold_in_device(jax.random.key_data(jax.random.key(0)), np.uint32(0)), (2,), 'uint64'
    )
