"""RandAugment: its operations, compared with Pillow's where it has them, and their sampling."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data.randaugment import (
  FILL_COLOR,
  RANDAUGMENT_OPS,
  RANDAUGMENT_VARIANTS,
  rand_augment,
)
from vit_jax.data.sampler import random_bits


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
  """Return smooth colors, edges and noise. No channel reaches 0 or 255."""
  y, x = np.mgrid[:40, :30]
  image = np.stack([200 * y / 40, 200 * x / 30, 100 + 60 * np.sin(x / 4 + y / 3)], -1) + 20
  image[10:20, 5:15] *= 0.6
  return (image + np.random.default_rng(0).normal(0, 4, image.shape)).clip(5, 250).astype(np.uint8)


# Operation -> (image, level) -> Pillow's result. Enhancement factors are 1.8 * level + 0.1.
SAME = {
  'AutoContrast': lambda image, level: ImageOps.autocontrast(image),
  'Equalize': lambda image, level: ImageOps.equalize(image),
  'Invert': lambda image, level: ImageOps.invert(image),
  'Posterize': lambda image, level: ImageOps.posterize(image, int(4 * level)),
  'Solarize': lambda image, level: ImageOps.solarize(image, int(256 * level)),
  'Color': lambda image, level: ImageEnhance.Color(image).enhance(1.8 * level + 0.1),
  'Contrast': lambda image, level: ImageEnhance.Contrast(image).enhance(1.8 * level + 0.1),
  'Brightness': lambda image, level: ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1),
  'Sharpness': lambda image, level: ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1),
}


@pytest.mark.parametrize('level', [0.75, 1.5])
@pytest.mark.parametrize('name', SAME)
def test_operations_equal_pillows_up_to_rounding(photo, name, level):
  """Pillow rounds gray and we truncate it: one unit, times the enhancement factor."""
  ours = RANDAUGMENT_OPS[name](photo, level, 0)
  theirs = np.asarray(SAME[name](Image.fromarray(photo), level))
  assert np.abs(ours.astype(int) - theirs).max() <= (1 if level < 1 else 3)
  assert ours.dtype == np.uint8


@pytest.mark.parametrize(('name', 'axis'), [('TranslateX', 1), ('TranslateY', 0)])
@pytest.mark.parametrize('bits', [0, 1 << 63])
def test_a_translation_shifts_by_a_fraction_of_the_side_and_fills_gray(photo, name, axis, bits):
  out = np.moveaxis(RANDAUGMENT_OPS[name](photo, 1.0, bits), axis, 0)
  image, by = np.moveaxis(photo, axis, 0), round(0.3 * photo.shape[axis])
  shifted, gray = (out[:-by], out[-by:]) if bits else (out[by:], out[:by])
  np.testing.assert_array_equal(shifted, image[by:] if bits else image[:-by])
  assert (gray == FILL_COLOR[0]).all()


def test_rotating_there_and_back_restores_the_center(photo):
  rotated = RANDAUGMENT_OPS['Rotate'](photo, 1.0, 0)
  back = RANDAUGMENT_OPS['Rotate'](rotated, 1.0, 1 << 63)
  center = (slice(16, 24), slice(12, 18))
  assert (
    np.abs(rotated[center].astype(int) - photo[center]).mean()
    > np.abs(back[center].astype(int) - photo[center]).mean()
  )


@pytest.mark.parametrize('bits', [0, 1 << 63])
def test_rotate_turns_by_30_degrees_per_level(photo, bits):
  square = photo[:30]
  expected = np.rot90(square, 1 if bits else -1)  # Counterclockwise by 90 degrees, or clockwise.
  np.testing.assert_array_equal(RANDAUGMENT_OPS['Rotate'](square, 3.0, bits), expected)


@pytest.mark.parametrize(('name', 'axis'), [('ShearX', 1), ('ShearY', 0)])
@pytest.mark.parametrize('bits', [0, 1 << 63])
def test_shear_shifts_each_line_by_a_multiple_of_its_index(photo, name, axis, bits):
  out = RANDAUGMENT_OPS[name](photo, 10 / 3, bits)  # 0.3 * 10 / 3 = 1 pixel per line.
  lines, out = (np.moveaxis(image, axis, 1) for image in (photo, out))
  for i, line in enumerate(lines):
    expected = np.full_like(line, FILL_COLOR[0])
    if i < len(line):
      n = len(line) - i
      expected[slice(0, n) if bits else slice(i, None)] = line[i:] if bits else line[:n]
    np.testing.assert_array_equal(out[i], expected)


def test_solarize_add_brightens_values_below_128(photo):
  out = RANDAUGMENT_OPS['SolarizeAdd'](photo, 0.5, 0)
  expected = [value + 55 if value < 128 else value for value in photo.ravel().tolist()]
  assert out.ravel().tolist() == expected


def test_cutout_covers_a_quarter_of_the_shorter_side_around_the_drawn_pixel(photo):
  center = 0x8000 << 16 | 0x8000 << 32  # Half of the height and of the width: (20, 15).
  expected = photo.copy()
  expected[16:24, 11:19] = 128  # 0.25 * 30 = 7.5, rounded to 8 pixels.
  np.testing.assert_array_equal(RANDAUGMENT_OPS['Cutout'](photo, 1.0, center), expected)


@pytest.mark.parametrize('name', ['ShearX', 'ShearY', 'Rotate', 'SolarizeAdd', 'Cutout'])
def test_operations_keep_the_shape_and_change_the_image(photo, name):
  out = RANDAUGMENT_OPS[name](photo, 1.0, 12345 << 20)
  assert (out.shape, out.dtype) == (photo.shape, np.uint8)
  assert (out != photo).any()


def test_the_same_bits_give_the_same_image_and_every_operation_occurs(photo):
  images = [
    rand_augment(photo, random_bits((0, 0, k), 100), count=1, magnitude=9) for k in range(100)
  ]
  again = rand_augment(photo, random_bits((0, 0, 7), 100), count=1, magnitude=9)
  np.testing.assert_array_equal(images[7], again)
  assert {random_bits((0, 0, k), 100)[0] % len(RANDAUGMENT_OPS) for k in range(200)} == set(
    range(len(RANDAUGMENT_OPS))
  )


def test_two_operations_are_applied_in_order(photo):
  names = list(RANDAUGMENT_OPS)
  bits = (names.index('Invert'), names.index('Posterize'))
  out = rand_augment(photo, bits, count=2, magnitude=5)
  np.testing.assert_array_equal(out, RANDAUGMENT_OPS['Posterize'](255 - photo, 0.5, 0))


PUBLISHED = RANDAUGMENT_VARIANTS['noisystudent']
EVERY_VALUE = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
# Magnitude -> (values that Posterize keeps apart, lowest value that Solarize inverts). Computed with
# TensorFlow 2.12 in graph mode by the lines of google-research/noisystudent, randaugment.py.
PUBLISHED_ARGUMENTS = {
  2: (2, 51), 6: (4, 153), 11: (16, 25), 12: (16, 51), 15: (64, 128), 18: (128, 204),
  20: (256, 0), 23: (2, 76), 24: (2, 102), 27: (2, 179), 30: (2, 0),
}  # fmt: skip


@pytest.mark.parametrize('magnitude', PUBLISHED_ARGUMENTS)
def test_posterize_and_solarize_overflow_as_the_published_code_does(magnitude):
  levels, threshold = PUBLISHED_ARGUMENTS[magnitude]
  posterized = PUBLISHED['Posterize'](EVERY_VALUE, magnitude / 10, 0)
  np.testing.assert_array_equal(posterized, EVERY_VALUE // (256 // levels) * (256 // levels))
  values = EVERY_VALUE.astype(int)
  expected = np.where(values < threshold, values, 255 - values)
  np.testing.assert_array_equal(PUBLISHED['Solarize'](EVERY_VALUE, magnitude / 10, 0), expected)


@pytest.mark.parametrize(('side', 'gray'), [(40, 6), (224, 196), (600, 255)])
def test_published_contrast_is_relative_to_the_number_of_pixels(side, gray):
  image = np.full((side, side, 3), 200, np.uint8)
  expected = min(255, int(gray + 1.9 * (200 - gray)))  # 1.8 * level + 0.1 = 1.9.
  np.testing.assert_allclose(PUBLISHED['Contrast'](image, 1.0, 0), expected, atol=1)


def test_published_distances_are_pixels():
  image = np.random.default_rng(0).integers(0, 120, (300, 200, 3), np.uint8)
  left = PUBLISHED['TranslateX'](image, 1.0, 1 << 63)
  np.testing.assert_array_equal(left[:, :100], image[:, 100:])
  assert (left[:, 100:] == 128).all()
  down = PUBLISHED['TranslateY'](image, 0.5, 0)
  np.testing.assert_array_equal(down[50:], image[:-50])
  assert (down[:50] == 128).all()
  covered = PUBLISHED['Cutout'](image, 0.5, 0x8000 << 16 | 0x8000 << 32)  # Around (150, 100).
  expected = image.copy()
  expected[130:170, 80:120] = 128
  np.testing.assert_array_equal(covered, expected)


def test_the_variant_changes_only_the_operations_that_the_module_names(photo):
  differing = {
    name
    for name, operation in RANDAUGMENT_OPS.items()
    if (operation(photo, 2.7, 7 << 20) != PUBLISHED[name](photo, 2.7, 7 << 20)).any()
  }
  assert differing == {'Posterize', 'Solarize', 'Contrast', 'Cutout', 'TranslateX', 'TranslateY'}
  bits = (list(PUBLISHED).index('Posterize'),)
  for operations in RANDAUGMENT_VARIANTS.values():
    out = rand_augment(photo, bits, count=1, magnitude=27, operations=operations)
    np.testing.assert_array_equal(out, operations['Posterize'](photo, 2.7, 0))
