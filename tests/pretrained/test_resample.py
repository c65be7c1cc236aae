"""Resampling matrices compared with scipy, PyTorch, JAX and timm."""

import warnings

import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax.pretrained.resample import (
  RESAMPLE_METHODS,
  bicubic_matrix,
  corner_aligned_matrix,
  half_pixel_matrix,
  pi_resize,
  resample_grid,
  resample_offsets,
)

RNG = np.random.default_rng(0)
SIDES = range(1, 41)
PAIRS = [(1, 5), (2, 9), (7, 12), (14, 24), (24, 14), (16, 37), (37, 16), (5, 1), (3, 2), (8, 8)]


def test_corner_aligned_resampling_equals_scipy_zoom_for_all_sides_up_to_40():
  """Compare with both modes of scipy.

  By default, scipy returns zeros for a last row whose position is rounded up to outside the table.
  This happens for 22 of the 1,600 pairs, such as 32 -> 16 and 28 -> 14. With mode='nearest' it
  does not happen.
  """
  zeros = 0
  for old in SIDES:
    table = 2 + RNG.random((old, 3))
    for new in SIDES:
      ours, zoom = corner_aligned_matrix(old, new) @ table, (new / old, 1)
      np.testing.assert_allclose(
        ours, scipy.ndimage.zoom(table, zoom, order=1, mode='nearest'), rtol=0, atol=1e-6
      )
      default = scipy.ndimage.zoom(table, zoom, order=1)
      lost = new > 1 and not default[-1].any()
      zeros += lost
      np.testing.assert_allclose(ours[: new - lost], default[: new - lost], rtol=0, atol=1e-6)
  assert zeros <= 30  # The exact number depends on rounding.


@pytest.mark.parametrize(
  ('heights', 'widths'),
  [((14, 24), (14, 24)), ((3, 6), (8, 5)), ((5, 1), (9, 13)), ((37, 16), (2, 40))],
)
def test_both_axes_of_a_grid_are_resampled_as_in_scipy(heights, widths):
  table = RNG.normal(size=(heights[0], widths[0], 4)).astype(np.float32)
  zoomed = scipy.ndimage.zoom(
    table.astype(np.float64), (heights[1] / heights[0], widths[1] / widths[0], 1), order=1
  )
  out = resample_grid(table, (heights[1], widths[1]))
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, zoomed, rtol=0, atol=1e-6)


@pytest.mark.parametrize('method', RESAMPLE_METHODS)
def test_an_unchanged_side_gives_the_identity_matrix(method):
  for side in SIDES:
    np.testing.assert_array_equal(RESAMPLE_METHODS[method](side, side), np.eye(side))
  table = RNG.normal(size=(5, 3, 2))
  assert resample_grid(table, (5, 3), method) is table


@pytest.mark.parametrize('method', RESAMPLE_METHODS)
def test_every_row_of_a_matrix_sums_to_one(method):
  for old, new in PAIRS:
    np.testing.assert_allclose(
      RESAMPLE_METHODS[method](old, new).sum(axis=1), 1, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
  ('matrix', 'mode'), [(half_pixel_matrix, 'bilinear'), (bicubic_matrix, 'bicubic')]
)
@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_half_pixel_methods_equal_pytorch(matrix, mode, old, new):
  torch = pytest.importorskip('torch')
  table = RNG.normal(size=(1, 1, old, 6))
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(table), size=(new, 6), mode=mode, align_corners=False
  )
  np.testing.assert_allclose(
    matrix(old, new) @ table[0, 0], theirs[0, 0].numpy(), rtol=0, atol=1e-10
  )


@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_half_pixel_resampling_equals_jax(old, new):
  table = RNG.normal(size=(old, 6, 2))
  with jax.enable_x64(True):  # In float32, JAX's weights are off by 1e-6.
    theirs = jax.image.resize(table, (new, 5, 2), 'bilinear', antialias=False)
  np.testing.assert_allclose(
    resample_grid(table, (new, 5), 'half_pixel'), theirs, rtol=0, atol=1e-10
  )


@pytest.mark.parametrize(('old', 'new'), [(4, 7), (16, 32), (8, 5), (32, 16), (6, 6)])
def test_pi_resize_equals_timm(old, new, timm):
  kernel = RNG.normal(size=(old, old, 3, 8)).astype(np.float32)
  from timm.layers import resample_patch_embed

  torch = pytest.importorskip('torch')
  theirs = resample_patch_embed(
    torch.from_numpy(kernel.transpose(3, 2, 0, 1)),
    [new, new],
    interpolation='bilinear',
    antialias=False,
  ).numpy()
  np.testing.assert_allclose(
    pi_resize(kernel, (new, new)), theirs.transpose(2, 3, 1, 0), rtol=0, atol=2e-5
  )


@pytest.mark.parametrize(
  ('old', 'new'), [((4, 4), (7, 7)), ((16, 16), (32, 32)), ((6, 4), (9, 10))]
)
def test_pi_resize_preserves_the_embedding_of_an_enlarged_patch(old, new):
  kernel, patch = RNG.normal(size=(*old, 3, 5)), RNG.normal(size=(*old, 3))
  grown = resample_grid(patch, new, 'half_pixel')
  before, after = (
    np.einsum('pqc,pqcd->d', x, w) for x, w in ((patch, kernel), (grown, pi_resize(kernel, new)))
  )
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
  ('old', 'new'),
  [((4, 4), (6, 10)), ((14, 14), (24, 24)), ((24, 24), (14, 14)), ((14, 14), (14, 9))],
  ids=str,
)
def test_relative_positions_are_resampled_as_timm_does_for_beit(old, new, timm):
  import torch
  from timm.layers import resize_rel_pos_bias_table

  rows = lambda grid: (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
  tables = RNG.normal(size=(2, rows(old), 3)).astype(np.float32)
  got = resample_offsets(tables, new, old)
  assert got.shape == (2, rows(new), 3)
  with warnings.catch_warnings():  # timm's interpolation copies a transposed array.
    warnings.simplefilter('ignore')
    for table, ours in zip(tables, got, strict=True):
      theirs = resize_rel_pos_bias_table(torch.from_numpy(table), new, (rows(new), 3), old).numpy()
      np.testing.assert_allclose(ours, theirs, atol=2e-5)
  np.testing.assert_array_equal(got[:, -3:], tables[:, -3:])
  assert resample_offsets(tables, old, old) is tables
