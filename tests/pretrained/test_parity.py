"""Every family of checkpoints gives the numbers of its reference implementation, on real photographs where there are any."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.families import FAMILIES, markdown

PHOTOS = Path(__file__).parents[3] / 'shared' / 'data' / 'flower_photos_1000.tar'


def photographs(count: int, size: tuple[int, int]) -> np.ndarray:
  """uint8 [count, h, w, 3]: flowers, or noise where there are none."""
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
  pytest.param(family, marks=[pytest.mark.slow] if family.slow else [], id=family.name)
  for family in FAMILIES
]


@pytest.mark.parametrize('family', CASES)
def test_our_numbers_are_theirs_to_2e_5_of_their_scale(family, tmp_path, request):
  reference = request.getfixturevalue(
    'transformers' if family.against == 'transformers' else 'timm'
  )
  ours, theirs = family.compare(tmp_path, photographs(4, family.size), reference)
  assert ours.shape == theirs.shape
  assert np.abs(theirs).max() > 0.1  # There is something to compare.
  assert np.abs(theirs - theirs[0]).max() > 1e-3  # And it depends on the image.
  difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  print(f'{family.name}: {difference:.1e}')
  assert difference <= 2e-5


def test_the_readme_lists_what_loads():
  assert markdown() in (Path(__file__).parents[2] / 'docs' / 'guides' / 'checkpoints.md').read_text(
    encoding='utf-8'
  )
