"""The mean attention distance: the paper's plateau, and plain loops in float64."""

import math

import numpy as np
import pytest

from vit_jax.paper.attention_distance import mean_attention_distance, patch_distances


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def random_attention(*shape: int) -> np.ndarray:
  return softmax(3 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize('first', [0, 1], ids=['no class token', 'class token'])
def test_uniform_attention_over_14_by_14_patches_of_16_pixels_is_at_116_5(first):
  n = 196 + first
  found = mean_attention_distance(
    np.full((2, 3, 4, n, n), 1 / n, np.float32), (14, 14), (16, 16), first=first
  )
  np.testing.assert_allclose(found, 116.5, atol=0.05)
  assert patch_distances((14, 14), (16, 16)).sum() / (196 * 195) == pytest.approx(
    117.1, abs=0.05
  )  # Without a patch to itself.


@pytest.mark.parametrize(('first', 'registers'), [(0, 0), (1, 0), (1, 2)])
def test_the_distance_is_that_of_plain_loops(first, registers):
  (h, w), (high, wide) = (3, 4), (16, 8)
  n, t = h * w, first + h * w + registers
  attention = random_attention(2, 2, 3, t, t)
  found = mean_attention_distance(attention, (h, w), (high, wide), first=first)
  for place in np.ndindex(2, 2, 3):
    total = 0.0
    for q in range(n):
      row = [float(attention[(*place, first + q, first + k)]) for k in range(n)]
      gap = lambda k, q=q: math.hypot((q // w - k // w) * high, (q % w - k % w) * wide)
      total += sum(weight * gap(k) for k, weight in enumerate(row)) / sum(row)
    assert found[place] == pytest.approx(total / n, rel=1e-9)


def test_attention_to_oneself_is_at_0_and_to_the_neighbour_at_a_patch():
  itself, beside = np.eye(4)[None, None, None], np.eye(4)[[1, 0, 3, 2]][None, None, None]
  assert mean_attention_distance(itself, (2, 2), (16, 16), first=0) == 0
  assert mean_attention_distance(beside, (2, 2), (16, 12), first=0) == 12
