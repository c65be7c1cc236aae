"""Each family of checkpoints computes the outputs of its reference implementation.

The images are photographs if the data set is available, and noise otherwise.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.families import FAMILIES, FIGURES, markdown

PHOTOS = Path(__file__).parents[3] / 'shared' / 'data' / 'flower_photos_1000.tar'


def photographs(count: int, size: tuple[int, int]) -> np.ndarray:
  """Return uint8 [count, h, w, 3]: flowers, or noise if the data set is missing."""
  if not PHOTOS.is_file():
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
  with tarfile.open(PHOTOS) as archive:
    members = [member for member in archive if member.name.endswith('.jpg')][:: 1000 // count][
      :count
    ]
    files = [archive.extractfile(member).read() for member in members]
  return np.stack(
    [np.asarray(Image.open(io.BytesIO(file)).convert('RGB').resize(size[::-1])) for file in files]
  )


CASES = [
  pytest.param(
    family,
    marks=[pytest.mark.slow, pytest.mark.timeout(3600)] if family.slow else [],
    id=family.name,
  )
  for family in FAMILIES
]


@pytest.mark.parametrize('family', CASES)
def test_our_outputs_equal_the_reference_to_2e_5(family, tmp_path, request):
  reference = request.getfixturevalue(
    'transformers' if family.against == 'transformers' else 'timm'
  )
  ours, theirs = family.compare(tmp_path, photographs(4, family.size), reference)
  assert ours.shape == theirs.shape
  assert np.abs(theirs).max() > 0.1  # The outputs are not all near zero.
  assert np.abs(theirs - theirs[0]).max() > 1e-3  # The outputs depend on the image.
  difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  print(f'\n{family.name}: {difference:.1e}')
  assert difference <= 2e-5


def test_the_guide_lists_every_family_with_a_difference_below_2e_5():
  figures = json.loads(FIGURES.read_text(encoding='utf-8'))
  assert len({family.name for family in FAMILIES}) == len(FAMILIES)
  assert all(0 <= float(difference) <= 2e-5 for difference in figures.values())
  guide = Path(__file__).parents[2] / 'docs' / 'guides' / 'checkpoints.md'
  assert markdown(figures) in guide.read_text(encoding='utf-8')
