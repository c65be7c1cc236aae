"""Mixup: the rows that are blended and the distribution of the weight."""

import jax
import numpy as np
import pytest
import scipy.stats

from vit_jax.data.mixup import mixup

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
TARGETS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1, 0]]


def blend(seed: int, *, alpha: float, mask: tuple[bool, ...] = (True,) * 6):
  return mixup(jax.random.key(seed), IMAGES, TARGETS, mask=np.array(mask), alpha=alpha)


@pytest.mark.parametrize('seed', range(3))
def test_images_and_targets_are_blended_with_the_previous_row_by_one_weight(seed):
  images, targets = blend(seed, alpha=0.5)
  weight = float(targets[1, 1])  # The previous row does not have label 1.
  assert 0.5 <= weight <= 1
  for i in range(6):  # Row -1 precedes row 0.
    expected = weight * IMAGES[i].astype(np.float64) + (1 - weight) * IMAGES[i - 1]
    np.testing.assert_allclose(images[i], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
      targets[i], weight * TARGETS[i] + (1 - weight) * TARGETS[i - 1], atol=1e-6
    )
  assert images.dtype == np.float32


def test_the_weight_is_the_larger_part_of_a_beta_draw():
  keys = jax.random.split(jax.random.key(0), 2000)
  mask = np.ones(2, bool)
  draw = lambda key: mixup(key, IMAGES[:2, :1, :1], TARGETS[:2], mask=mask, alpha=0.2)[1][0, 0]
  weights = np.asarray(jax.jit(jax.vmap(draw))(keys))
  beta = scipy.stats.beta(0.2, 0.2)
  # max(x, 1 - x) of a symmetric distribution has twice the density of its upper half.
  # Weights that round to 1 are only counted.
  cdf = lambda weight: 2 * beta.cdf(weight) - 1
  below = weights[weights < 0.999]
  assert below.min() >= 0.5
  assert scipy.stats.kstest(below, lambda weight: cdf(weight) / cdf(0.999)).pvalue > 1e-3
  assert len(below) / 2000 == pytest.approx(cdf(0.999), abs=5 * np.sqrt(0.25 / 2000))


def test_the_same_key_gives_the_same_blend_and_another_key_another():
  once, again, other = (blend(seed, alpha=0.8) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert np.abs(once[1] - other[1]).max() > 1e-3


def test_blended_targets_keep_their_sum():
  _, targets = blend(2, alpha=0.3)
  np.testing.assert_allclose(targets.sum(axis=1), np.ones(6), atol=1e-6)


def test_a_row_without_an_image_takes_no_part():
  """Row 2 could not be read, so rows 2 and 3 stay as they are, and the others are blended."""
  images, targets = blend(0, alpha=0.5, mask=(True, True, False, True, True, True))
  everywhere, all_targets = blend(0, alpha=0.5)
  for i in range(6):
    expected = (IMAGES[i], TARGETS[i]) if i in (2, 3) else (everywhere[i], all_targets[i])
    np.testing.assert_array_equal(images[i], expected[0])
    np.testing.assert_array_equal(targets[i], expected[1])
  np.testing.assert_allclose(targets.sum(axis=1), np.ones(6), atol=1e-6)
