"""The filters' principal components, against scikit-learn's."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vit_jax.paper.embedding_filters import (
  components_to_rgb,
  compute_filter_components,
  low_frequency_energy,
)


@pytest.mark.parametrize(
  ('patch', 'd'), [((4, 4), 96), ((6, 3), 40), ((2, 2), 9)], ids=['square', 'oblong', 'few']
)
def test_components_and_variances_are_scikit_learns_up_to_sign(patch, d):
  rng = np.random.default_rng(0)
  kernel = (rng.normal(size=(*patch, 3, d)) + rng.normal(size=d)).astype(np.float32)
  found, variance = compute_filter_components(kernel, count=8)
  pca = PCA(n_components=8, svd_solver='full').fit(kernel.reshape(-1, d).T.astype(np.float64))
  theirs = pca.components_.reshape(-1, *patch, 3)
  signs = np.sign((found * theirs).sum(axis=(1, 2, 3), keepdims=True))
  np.testing.assert_allclose(found, signs * theirs, atol=1e-9)
  np.testing.assert_allclose(variance, pca.explained_variance_ratio_, rtol=1e-9)
  assert all(each.flat[np.abs(each).argmax()] > 0 for each in found)


def test_grey_is_zero_and_the_largest_number_is_full_colour():
  found = components_to_rgb(np.array([[[[0.0, 2, -1]]], [[[0.0, -4, 4]]]]))
  np.testing.assert_array_equal(found, [[[[0.5, 1, 0.25]]], [[[0.5, 0, 1]]]])


def test_smooth_filters_are_distinguished_from_noise():
  y, x = np.mgrid[:14, :14] / 14
  wave = np.cos(2 * np.pi * (x + y))[None, ..., None] * np.ones(3)
  noise = np.random.default_rng(0).normal(size=(200, 14, 14, 3))
  assert low_frequency_energy(wave)[0] == pytest.approx(1)
  assert low_frequency_energy(noise).mean() == pytest.approx(9 / 196, rel=0.05)
