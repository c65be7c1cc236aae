"""Mixup on the device: what is blended with what, by how much, and how often."""

import jax
import numpy as np
import pytest
import scipy.stats

from vit_jax.data.augment import mixup

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
TARGETS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1, 0]]


@pytest.mark.parametrize('seed', range(3))
def test_images_and_targets_are_blended_with_the_previous_row_by_one_share(seed):
  images, targets = mixup(jax.random.key(seed), IMAGES, TARGETS, 0.5)
  share = float(targets[1, 1])  # Of the label 1, which the row before doesn't have.
  assert 0.5 <= share <= 1
  for i in range(6):  # Row 0's previous row is -1: the last.
    expected = share * IMAGES[i].astype(np.float64) + (1 - share) * IMAGES[i - 1]
    np.testing.assert_allclose(images[i], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
      targets[i], share * TARGETS[i] + (1 - share) * TARGETS[i - 1], atol=1e-6
    )
  assert images.dtype == np.float32


def test_the_share_is_the_larger_part_of_a_beta_draw():
  keys = jax.random.split(jax.random.key(0), 2000)
  blend = jax.jit(jax.vmap(lambda key: mixup(key, IMAGES[:2, :1, :1], TARGETS[:2], 0.2)[1][0, 0]))
  shares = np.asarray(blend(keys))
  beta = scipy.stats.beta(0.2, 0.2)
  # max(x, 1 - x) of a symmetric distribution is its upper half, twice. What rounds to 1 is only counted.
  cdf = lambda share: 2 * beta.cdf(share) - 1
  below = shares[shares < 0.999]
  assert below.min() >= 0.5
  assert scipy.stats.kstest(below, lambda share: cdf(share) / cdf(0.999)).pvalue > 1e-3
  assert len(below) / 2000 == pytest.approx(cdf(0.999), abs=5 * np.sqrt(0.25 / 2000))


def test_the_same_key_blends_the_same_way_and_another_one_differently():
  once, again, other = (mixup(jax.random.key(seed), IMAGES, TARGETS, 0.8) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert np.abs(once[1] - other[1]).max() > 1e-3


def test_every_target_still_sums_to_what_it_did():
  _, targets = mixup(jax.random.key(2), IMAGES, TARGETS, 0.3)
  np.testing.assert_allclose(targets.sum(axis=1), np.ones(6), atol=1e-6)
