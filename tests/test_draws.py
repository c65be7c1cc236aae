"""What each device draws for its own rows is what one device draws for all."""

import jax
import numpy as np
import pytest

from vit_jax.draws import own_rows


def rows_of(draw, key, places: int) -> np.ndarray:
  """The draws of all places, one under another."""
  data = jax.random.key_data(key)
  return np.concatenate([draw(own_rows(data, np.uint32(place))) for place in range(places)])


@pytest.mark.parametrize('shape', [(2,), (3, 1, 1), (4, 5, 7), (1, 300, 257)])
@pytest.mark.parametrize('draw', [jax.random.bernoulli, jax.random.normal])
def test_the_rows_of_eight_places_are_those_of_one_draw(shape, draw):
  key = jax.random.fold_in(jax.random.key(3), 7)
  all_rows = (8 * shape[0], *shape[1:])
  np.testing.assert_array_equal(rows_of(lambda key: draw(key, shape=shape), key, 8), draw(key, shape=all_rows))


def test_splitting_and_folding_in_keep_the_place():
  key = jax.random.key(5)
  derive = lambda key: jax.random.fold_in(jax.random.split(key, 3)[1], 9)
  found = rows_of(lambda key: jax.random.uniform(derive(key), (2, 3)), key, 4)
  np.testing.assert_array_equal(found, jax.random.uniform(derive(key), (8, 3)))


def test_rows_beyond_the_first_four_billion_numbers_are_numbered_on():
  """Place 70,000 of rows of 2^16 elements begins at number 2^32 and more: JAX's own high half."""
  data = jax.random.key_data(jax.random.key(0))
  near, far = (jax.random.bits(own_rows(data, np.uint32(place)), (1, 2**16)) for place in (70_000 - 2**16, 70_000))
  assert (near != far).mean() > 0.99


def test_more_than_32_bits_are_refused():
  with jax.enable_x64(True), pytest.raises(NotImplementedError, match='64 random bits'):
    jax.random.bits(own_rows(jax.random.key_data(jax.random.key(0)), np.uint32(0)), (2,), 'uint64')
