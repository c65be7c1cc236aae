"""Attention rollout: plain loops in float64, and cases with known results."""

import numpy as np
import pytest

from tests.paper.test_attention_distance import random_attention
from vit_jax.paper.attention_rollout import (
  attention_rollout,
  mask_concentration,
  rollout_mask,
  shade_image,
)


def test_the_rollout_is_that_of_plain_loops():
  b, layers, heads, t = 2, 3, 2, 5
  attention = random_attention(b, layers, heads, t, t)
  found = attention_rollout(attention)
  for image in range(b):
    carried = [[float(i == j) for j in range(t)] for i in range(t)]
    for layer in range(layers):
      a = [
        [
          sum(float(attention[image, layer, h, i, j]) for h in range(heads)) / heads + (i == j)
          for j in range(t)
        ]
        for i in range(t)
      ]
      a = [[value / sum(row) for value in row] for row in a]
      carried = [
        [sum(a[i][k] * carried[k][j] for k in range(t)) for j in range(t)] for i in range(t)
      ]
    np.testing.assert_allclose(found[image], carried, rtol=1e-9)
  np.testing.assert_allclose(found.sum(axis=-1), 1)


def test_without_attention_to_others_every_token_keeps_itself():
  np.testing.assert_allclose(
    attention_rollout(np.broadcast_to(np.eye(5), (1, 4, 2, 5, 5))), np.eye(5)[None]
  )


def test_the_mask_is_the_class_tokens_row_or_the_mean_of_all():
  rolled = np.arange(2 * 49, dtype=float).reshape(2, 7, 7)
  np.testing.assert_array_equal(
    rollout_mask(rolled, (2, 3), token=True)[1], [[50, 51, 52], [53, 54, 55]]
  )
  np.testing.assert_array_equal(
    rollout_mask(rolled[:, :6, :6], (2, 3), token=False)[0].ravel(), rolled[0, :6, :6].mean(axis=0)
  )


def test_an_image_is_dark_where_the_mask_is_low_and_as_it_was_where_it_is_high():
  image = np.full((64, 96, 3), 200, np.uint8)
  seen = np.zeros((4, 6))
  seen[1, 4] = 1
  shaded = shade_image(image, seen, blur=4)
  assert shaded.shape == image.shape
  assert shaded[24, 72].tolist() == pytest.approx([200] * 3, abs=8)
  assert shaded[56, 8].max() < 10


def test_concentration_is_1_for_a_uniform_mask():
  even, one = np.ones((1, 10, 10)), np.zeros((1, 10, 10))
  one[0, 3, 4] = 5
  assert mask_concentration(np.concatenate([even, one])).tolist() == pytest.approx([1, 10])
