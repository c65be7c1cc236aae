"""Sums over microbatches, against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.sharding.fsdp import sum_over_microbatches


def test_microbatch_i_has_rows_i_plus_multiples_of_the_count_and_its_own_key():
  rows, key = jnp.arange(1.0, 13.0), jax.random.key(4)

  def function(params, rows, key):
    return params * rows.sum() * jax.random.uniform(key), rows[0]

  total, first_rows = sum_over_microbatches(function, 3, jnp.float32(2), (rows,), key)
  draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(3)]
  sums = (1 + 4 + 7 + 10, 2 + 5 + 8 + 11, 3 + 6 + 9 + 12)
  expected = sum(2 * s * draw for s, draw in zip(sums, draws, strict=True))
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert first_rows == 1 + 2 + 3
