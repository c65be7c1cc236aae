"""RandAugment's operations against Pillow's, where Pillow has the same, and its draws."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data.images import random_bits
from vit_jax.data.randaugment import FILL_COLOR, RANDAUGMENT_OPS, rand_augment


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  """Smooth colours, edges, and noise; none of the channels reaches 0 or 255."""
  y, x = np.mgrid[:40, :30]
  image = np.stack([200 * y / 40, 200 * x / 30, 100 + 60 * np.sin(x / 4 + y / 3)], -1) + 20
  image[10:20, 5:15] *= 0.6
  return (image + np.random.default_rng(0).normal(0, 4, image.shape)).clip(5, 250).astype(np.uint8)


# For a share of 0.75 and one of 1.5. The factor of Pillow's enhancements is 1.8 times it, and 0.1.
SAME = {
  'AutoContrast': lambda image, share: ImageOps.autocontrast(image),
  'Equalize': lambda image, share: ImageOps.equalize(image),
  'Invert': lambda image, share: ImageOps.invert(image),
  'Posterize': lambda image, share: ImageOps.posterize(image, int(4 * share)),
  'Solarize': lambda image, share: ImageOps.solarize(image, int(256 * share)),
  'Color': lambda image, share: ImageEnhance.Color(image).enhance(1.8 * share + 0.1),
  'Contrast': lambda image, share: ImageEnhance.Contrast(image).enhance(1.8 * share + 0.1),
  'Brightness': lambda image, share: ImageEnhance.Brightness(image).enhance(1.8 * share + 0.1),
  'Sharpness': lambda image, share: ImageEnhance.Sharpness(image).enhance(1.8 * share + 0.1),
}


@pytest.mark.parametrize('share', [0.75, 1.5])
@pytest.mark.parametrize('name', SAME)
def test_an_operation_is_pillows_but_for_rounding(photo, name, share):
  """A grey that Pillow rounds and we cut is one level off, times the factor by which enhancement leads away from it."""
  ours = RANDAUGMENT_OPS[name](photo, share, 0)
  theirs = np.asarray(SAME[name](Image.fromarray(photo), share))
  assert np.abs(ours.astype(int) - theirs).max() <= (1 if share < 1 else 3)
  assert ours.dtype == np.uint8


@pytest.mark.parametrize(('name', 'axis'), [('TranslateX', 1), ('TranslateY', 0)])
@pytest.mark.parametrize('bits', [0, 1 << 63])
def test_a_translation_moves_by_a_share_of_the_side_and_leaves_grey(photo, name, axis, bits):
  out = np.moveaxis(RANDAUGMENT_OPS[name](photo, 1.0, bits), axis, 0)
  image, by = np.moveaxis(photo, axis, 0), round(0.3 * photo.shape[axis])
  moved, grey = (out[:-by], out[-by:]) if bits else (out[by:], out[:by])
  np.testing.assert_array_equal(moved, image[by:] if bits else image[:-by])
  assert (grey == FILL_COLOR[0]).all()


def test_three_rotations_of_30_degrees_and_back_keep_the_middle(photo):
  there = RANDAUGMENT_OPS['Rotate'](photo, 1.0, 0)
  back = RANDAUGMENT_OPS['Rotate'](there, 1.0, 1 << 63)
  middle = (slice(16, 24), slice(12, 18))
  assert (
    np.abs(there[middle].astype(int) - photo[middle]).mean()
    > np.abs(back[middle].astype(int) - photo[middle]).mean()
  )


@pytest.mark.parametrize('name', ['ShearX', 'ShearY', 'Rotate', 'SolarizeAdd', 'Cutout'])
def test_an_operation_keeps_the_shape_and_changes_something(photo, name):
  out = RANDAUGMENT_OPS[name](photo, 1.0, 12345 << 20)
  assert (out.shape, out.dtype) == (photo.shape, np.uint8)
  assert (out != photo).any()


def test_the_same_bits_make_the_same_image_and_every_operation_comes(photo):
  images = [
    rand_augment(photo, random_bits((0, 0, k), 100), count=1, magnitude=9) for k in range(100)
  ]
  again = rand_augment(photo, random_bits((0, 0, 7), 100), count=1, magnitude=9)
  np.testing.assert_array_equal(images[7], again)
  assert {random_bits((0, 0, k), 100)[0] % len(RANDAUGMENT_OPS) for k in range(200)} == set(
    range(len(RANDAUGMENT_OPS))
  )


def test_two_operations_come_one_after_the_other(photo):
  names = list(RANDAUGMENT_OPS)
  bits = (names.index('Invert'), names.index('Posterize'))
  out = rand_augment(photo, bits, count=2, magnitude=5)
  np.testing.assert_array_equal(out, RANDAUGMENT_OPS['Posterize'](255 - photo, 0.5, 0))
