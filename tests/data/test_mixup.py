"""Mixup and CutMix: the rows that are mixed and the distribution of the weight."""

import sys

import jax
import numpy as np
import pytest
import scipy.stats

from vit_jax.data.mixup import cutmix, make_mix, mixup

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


def paste(seed: int, *, alpha: float = 1.0, mask: tuple[bool, ...] = (True,) * 6):
  return cutmix(jax.random.key(seed), IMAGES, TARGETS, mask=np.array(mask), alpha=alpha)


@pytest.mark.parity
@pytest.mark.parametrize('seed', range(8))
def test_cutmix_equals_timms_for_the_same_draws(seed, timm, monkeypatch):
  """timm mixes with the reversed batch, which is the previous row in a batch of two."""
  import torch

  module = sys.modules['timm.data.mixup']
  rng = np.random.default_rng(seed)
  images, targets = rng.integers(0, 256, (2, 37, 50, 3), np.uint8), TARGETS[1:3]
  area_key, *center_keys = jax.random.split(jax.random.key(seed), 3)
  lam = float(jax.random.beta(area_key, 0.8, 0.8))
  y, x = (
    int(jax.random.randint(key, (), 0, n)) for key, n in zip(center_keys, (37, 50), strict=True)
  )
  monkeypatch.setattr(module.np.random, 'beta', lambda *args: lam)
  centers = iter((y, x))
  monkeypatch.setattr(module.np.random, 'randint', lambda *args, size: next(centers))
  mix = module.Mixup(mixup_alpha=0, cutmix_alpha=0.8, label_smoothing=0, num_classes=4)
  theirs, their_targets = mix(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor([1, 2]))
  mask = np.ones(2, bool)
  ours, our_targets = cutmix(jax.random.key(seed), images, targets, mask=mask, alpha=0.8)
  np.testing.assert_array_equal(ours, theirs.permute(0, 2, 3, 1).numpy())
  np.testing.assert_allclose(our_targets, their_targets.numpy(), atol=1e-6)
  assert ours.dtype == np.uint8


def test_cutmix_leaves_rows_without_an_image_and_the_rows_after_them():
  """Row 2 could not be read. All rows have the same box."""
  images, targets = paste(3, mask=(True, True, False, True, True, True))
  everywhere, all_targets = paste(3)
  assert (np.asarray(everywhere) != IMAGES).any(axis=(1, 2, 3)).all()
  for i in range(6):
    expected = (IMAGES[i], TARGETS[i]) if i in (2, 3) else (everywhere[i], all_targets[i])
    np.testing.assert_array_equal(images[i], expected[0])
    np.testing.assert_array_equal(targets[i], expected[1])


def test_cutmix_of_grey_images_is_that_of_their_color():
  key, mask = jax.random.key(0), np.ones(6, bool)
  grey, _ = cutmix(key, IMAGES[..., :1], TARGETS, mask=mask, alpha=1.0)
  np.testing.assert_array_equal(grey, paste(0)[0][..., :1])


SWITCH = {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0, 'cutmix_probability': 0.3}


def test_a_batch_has_either_cutmix_with_its_probability_or_mixup():
  """A batch with CutMix has only values of two images. One with mixup has others."""
  images = np.stack([np.full((8, 8, 1), value, np.uint8) for value in (0, 100)])
  mix, mask = make_mix(**SWITCH), np.ones(2, bool)
  keys = jax.random.split(jax.random.key(0), 2000)
  mixed, targets = jax.jit(jax.vmap(lambda key: mix(key, images, np.eye(2), mask=mask)))(keys)
  is_cutmix = np.isin(np.asarray(mixed), (0, 100)).all(axis=(1, 2, 3, 4))
  assert scipy.stats.binomtest(int(is_cutmix.sum()), 2000, 0.3).pvalue > 1e-3
  # The part of an image that another replaces is the weight of its label.
  np.testing.assert_allclose(mixed[:, 1].mean(axis=(1, 2, 3)) / 100, targets[:, 1, 1], atol=1e-5)
  np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-6)
  assert (targets[~is_cutmix, 1, 1] >= 0.5).all() and (targets[is_cutmix, 1, 1] < 0.5).any()


def test_either_mixture_leaves_rows_without_an_image():
  mask = np.array((True, True, False, True, True, True))
  for seed in range(20):
    images, targets = make_mix(**SWITCH)(jax.random.key(seed), IMAGES, TARGETS, mask=mask)
    np.testing.assert_array_equal(images[2:4], IMAGES[2:4])
    np.testing.assert_array_equal(targets[2:4], TARGETS[2:4])


def test_without_a_parameter_nothing_is_mixed():
  assert make_mix(mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_probability=0.5) is None
  only = make_mix(mixup_alpha=0.0, cutmix_alpha=1.0, cutmix_probability=0.5)
  images, _ = only(jax.random.key(0), IMAGES, TARGETS, mask=np.ones(6, bool))
  np.testing.assert_array_equal(images, paste(0)[0])
