"""The similarity of position embeddings: computed by hand, and means of the paper's matrices."""

import numpy as np
import pytest

from vit_jax.paper.position_similarity import (
  mean_similarities,
  position_similarity,
  tile_similarity_maps,
)
from vit_jax.paper.published import read_position_similarities

# Computed from the same pixels by code that does not belong to this project.
#                                same row  column  neither neighbours
PUBLISHED = {
  'fig7_center_vit_l32':         (0.513, 0.441, -0.038, 0.665),
  'fig10a_l16_7ep_lr2e-4_wd.01': (0.521, 0.384, -0.065, 0.889),
  'fig10b_l16_7ep_lr4e-4_wd.1':  (0.485, 0.421, -0.068, 0.738),
  'fig10c_l16_14ep_lr4e-4_wd.1': (0.443, 0.446, -0.067, 0.726),
}  # fmt: skip


@pytest.mark.parametrize('panel', PUBLISHED)
def test_the_published_matrices_give_the_published_means(panel):
  matrix = read_position_similarities()[panel]
  side = round(len(matrix) ** 0.5)
  found = mean_similarities(matrix, (side, side))
  assert tuple(found) == ('same row', 'same column', 'neither', 'neighbours')
  assert tuple(found.values()) == pytest.approx(PUBLISHED[panel], abs=6e-4)


def test_cosines_and_means_are_those_of_plain_loops():
  h, w = 3, 4
  x = np.random.default_rng(0).normal(size=(h * w, 7)).astype(np.float32)
  cosines = position_similarity(x)
  groups = {'same row': [], 'same column': [], 'neither': [], 'neighbours': []}
  for i in range(h * w):
    for j in range(h * w):
      a, b = x[i].astype(np.float64), x[j].astype(np.float64)
      cosine = sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5
      assert cosines[i, j] == pytest.approx(cosine, abs=1e-12)
      (r, c), (s, d) = divmod(i, w), divmod(j, w)
      if i != j:
        groups['same row' if r == s else 'same column' if c == d else 'neither'].append(cosine)
      if abs(r - s) + abs(c - d) == 1:
        groups['neighbours'].append(cosine)
  assert mean_similarities(cosines, (h, w)) == {
    name: pytest.approx(np.mean(values)) for name, values in groups.items()
  }


def test_each_patch_has_its_map_at_its_place():
  h, w = 2, 3
  cosines = np.random.default_rng(0).normal(size=(h * w, h * w))
  picture = tile_similarity_maps(cosines, (h, w))
  assert picture.shape == (h * (h + 1), w * (w + 1))
  for i in range(h * w):
    y, x = (i // w) * (h + 1), (i % w) * (w + 1)
    np.testing.assert_array_equal(picture[y : y + h, x : x + w].ravel(), cosines[i])
  assert np.isnan(picture).sum() == picture.size - cosines.size
