"""Each operation of the augmentation equals its reference on real photos.

The distributions of what it draws are compared in test_augment_draws.py.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.augment_certificates import CERTIFICATES, FIGURES, Certificate, markdown

pytestmark = pytest.mark.parity


def read_photos(count: int) -> list[np.ndarray]:
  """Return photos, resized without a crop to three sizes, of which two are not square."""
  from tests.conftest import SHARED

  if not SHARED.is_dir():
    pytest.skip(f'no {SHARED}')
  with tarfile.open(SHARED / 'flower_photos_1000.tar') as tar:
    members = [each for each in tar if each.name.endswith('.jpg')]
    files = [tar.extractfile(each).read() for each in members[:: len(members) // count][:count]]
  sizes = ((224, 224), (224, 192), (160, 224))
  return [
    np.asarray(Image.open(io.BytesIO(file)).convert('RGB').resize(sizes[i % 3]))
    for i, file in enumerate(files)
  ]


@pytest.fixture(scope='module')
def few_photos() -> list[np.ndarray]:
  """Return 5 photos."""
  return read_photos(5)


@pytest.fixture(scope='module')
def photos() -> list[np.ndarray]:
  """Return 200 photos."""
  return read_photos(200)


EVERY_OPERATION = pytest.mark.parametrize('case', CERTIFICATES, ids=[c.name for c in CERTIFICATES])


def largest_difference(case: Certificate, images: list[np.ndarray]) -> float:
  """Return the largest difference over images, with magnitudes from none to the largest."""
  largest = 0.0
  for i, image in enumerate(images):
    before = image.copy()
    ours, theirs = case.compare(image, i / (len(images) - 1), i)
    assert (ours.shape, ours.dtype) == (theirs.shape, np.uint8)
    np.testing.assert_array_equal(image, before)
    largest = max(largest, float(np.abs(ours - theirs.astype(np.float64)).max()))
  return largest


@EVERY_OPERATION
def test_an_operation_is_within_1_of_255_of_its_reference(case, few_photos, timm):
  assert largest_difference(case, few_photos) <= 1


@EVERY_OPERATION
def test_an_operation_is_within_1_of_255_of_its_reference_on_200_photos(case, photos, timm):
  largest = largest_difference(case, photos)
  print(f'\n{case.name}: {largest:.2g}')
  assert largest <= 1


def test_the_guide_lists_every_operation_with_a_difference_of_at_most_1():
  figures = json.loads(FIGURES.read_text(encoding='utf-8'))
  assert all(0 <= float(difference) <= 1 for difference in figures.values())
  guide = Path(__file__).parents[2] / 'docs' / 'guides' / 'augmentation.md'
  assert markdown(figures) in guide.read_text(encoding='utf-8')
