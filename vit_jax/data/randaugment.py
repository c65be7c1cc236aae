"""RandAugment (arXiv 1909.13719) as Noisy Student uses it (arXiv 1911.04252).

It applies a few operations from a table to uint8 images [h, w, 3], all at one magnitude, on the
host. There are two variants of the table here, and one in big_vision_randaugment.py.

- 'noisystudent' computes what the code of google-research/noisystudent computes. Some of it was
  hardly intended: below magnitude 2.5 and from 22.5, Posterize keeps only the highest bit. From
  magnitude 10, the threshold of Solarize starts again at 0. Contrast is relative to a gray that
  depends on the number of pixels. Cutout and translations are in pixels at any image size.
- 'intended' differs in these operations only. Posterize keeps no bit below magnitude 2.5. It
  changes nothing from 20, nor does Solarize from 10. Contrast is relative to the mean of the image,
  and distances are fractions of the image.

Pixels from outside the image are gray.

Every operation takes (image, level, bits): `level` is the magnitude / 10, and `bits` is a uniform
64-bit integer from which all of its randomness comes.
"""

import functools
from collections.abc import Callable

import cv2
import numpy as np

from vit_jax.data import pillow_ops

MAGNITUDE_SCALE = 10.0  # The magnitude of level 1. Noisy Student's largest magnitude is 27.
FILL_COLOR = (128, 128, 128)
RAMP = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)  # Every value.
LUMA_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)

ImageArray = np.ndarray
Operation = Callable[[ImageArray, float, int], ImageArray]


def rand_augment(
  image: ImageArray,
  bits: tuple[int, ...],
  *,
  count: int,
  magnitude: float,
  operations: dict[str, Operation] | None = None,
) -> ImageArray:
  """Apply `count` random operations to the image [h, w, 3].

  Args:
    image: uint8 [h, w, 3].
    bits: Uniform 64-bit integers, one per operation.
    count: Number of operations.
    magnitude: Strength; 10 is level 1.
    operations: The table of a variant. None means 'intended'.
  """
  operations = list((operations or RANDAUGMENT_OPS).values())
  for each in bits[:count]:
    image = operations[each % len(operations)](image, magnitude / MAGNITUDE_SCALE, each)
  return image


def randomly_negate(amount: float, bits: int) -> float:
  """Return the amount or its negative, each with probability 1/2."""
  return amount if bits >> 63 else -amount


def blend(image: ImageArray, other: ImageArray, factor: float) -> ImageArray:
  """Return other + factor * (image - other). A factor above 1 extrapolates away from `other`."""
  return pillow_ops.blend(other, image, factor)


def enhance_factor(level: float) -> float:
  """Return the factor for `blend`. It is 1, no change, at a magnitude of 5."""
  return 1.8 * level + 0.1


def by_value(operation: Operation) -> Operation:
  """Return an operation on single values as a look-up in its results for all values."""

  @functools.wraps(operation)
  def look_up(image: ImageArray, level: float, bits: int) -> ImageArray:
    return cv2.LUT(image, operation(RAMP, level, bits))

  return look_up


def autocontrast(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Stretch each channel to the range 0 to 255."""
  low, high = pillow_ops.channel_ranges(image).astype(np.float32)
  scale = 255 / np.where(high > low, high - low, 255)
  stretched = np.clip((RAMP - low) * scale, 0, 255).astype(np.uint8)
  return cv2.LUT(image, np.where(high > low, stretched, RAMP))


def equalize(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Equalize the histogram of each channel."""
  return pillow_ops.equalize(image)


def invert(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Invert all colors."""
  return 255 - image


def posterize(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Keep the top 4 * level bits of each channel. A smaller level keeps fewer."""
  shift = 8 - min(8, int(4 * level))
  return (image >> shift) << shift if shift < 8 else np.zeros_like(image)


def posterize_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Keep the top 4 * level bits of each channel, but only the highest bit if these are 0 or over 8.

  TensorFlow converts a shift of -1 bits to uint8, where it is 255, and shifts by 7 bits at most.
  """
  shift = min(7, (8 - int(4 * level)) % 256)
  return (image >> shift) << shift


def solarize(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Invert the values that are at least 256 * level."""
  return np.where(image < int(256 * level), image, 255 - image)


def solarize_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Invert the values that are at least 256 * level, modulo 256: the threshold is a uint8."""
  return np.where(image < int(256 * level) % 256, image, 255 - image)


def solarize_add(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Add 110 * level to the values below 128."""
  brighter = np.clip(image.astype(np.int32) + int(110 * level), 0, 255).astype(np.uint8)
  return np.where(image < 128, brighter, image)


def adjust_color(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with the gray version of the image."""
  gray = (image.astype(np.float32) @ LUMA_WEIGHTS).astype(np.uint8)
  return blend(image, cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), enhance_factor(level))


def adjust_contrast(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with the mean gray of the image."""
  mean = int((image.astype(np.float32) @ LUMA_WEIGHTS).astype(np.uint8).mean() + 0.5)
  return blend_with_gray(image, mean, level)


def adjust_contrast_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with the gray of 1/256 of the number of pixels, at most 255.

  The code sums the counts of the image's histogram without their values.
  """
  return blend_with_gray(image, min(255, image.shape[0] * image.shape[1] // 256), level)


def blend_with_gray(image: ImageArray, gray: int, level: float) -> ImageArray:
  """Blend with a constant."""
  return cv2.LUT(image, blend(RAMP, np.full_like(RAMP, gray), enhance_factor(level)))


def adjust_brightness(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with black."""
  return blend(image, np.zeros_like(image), enhance_factor(level))


def adjust_sharpness(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with a smoothed version of the image. The outermost pixels do not change."""
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
  smooth = image.copy()
  if min(image.shape[:2]) > 2:
    filtered = np.clip(cv2.filter2D(image.astype(np.float32), -1, kernel), 0, 255)
    smooth[1:-1, 1:-1] = filtered[1:-1, 1:-1]
  return blend(image, smooth, enhance_factor(level))


def warp_affine(image: ImageArray, matrix: list[list[float]]) -> ImageArray:
  """Fill each output position (x, y) with the nearest pixel at matrix @ (x, y, 1), or with gray."""
  return cv2.warpAffine(
    image,
    np.array(matrix, np.float64),
    image.shape[1::-1],
    flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=FILL_COLOR,
  )


def rotate(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Rotate by 30 * level degrees about the center, in a random direction."""
  angle = np.deg2rad(randomly_negate(30 * level, bits))
  cos, sin = np.cos(angle), np.sin(angle)
  (y, x) = ((side - 1) / 2 for side in image.shape[:2])
  return warp_affine(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def shear_x(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift each row by 0.3 * level times its y, left or right."""
  return warp_affine(image, [[1, randomly_negate(0.3 * level, bits), 0], [0, 1, 0]])


def shear_y(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift each column by 0.3 * level times its x, up or down."""
  return warp_affine(image, [[1, 0, 0], [randomly_negate(0.3 * level, bits), 1, 0]])


def shift_pixels(image: ImageArray, x: float = 0, y: float = 0) -> ImageArray:
  """Shift the image left by `x` and up by `y` pixels."""
  return warp_affine(image, [[1, 0, x], [0, 1, y]])


def translate_x(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 0.3 * level times the width, left or right."""
  return shift_pixels(image, x=randomly_negate(round(0.3 * level * image.shape[1]), bits))


def translate_y(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 0.3 * level times the height, up or down."""
  return shift_pixels(image, y=randomly_negate(round(0.3 * level * image.shape[0]), bits))


def translate_x_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 100 * level pixels, left or right."""
  return shift_pixels(image, x=randomly_negate(100 * level, bits))


def translate_y_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 100 * level pixels, up or down."""
  return shift_pixels(image, y=randomly_negate(100 * level, bits))


def cover_square(image: ImageArray, half: int, bits: int) -> ImageArray:
  """Cover a square of 2 * half pixels around a random pixel with gray."""
  y, x = (
    (bits >> shift & 0xFFFF) * side >> 16
    for shift, side in zip((16, 32), image.shape[:2], strict=True)
  )
  image = image.copy()
  image[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL_COLOR
  return image


def cutout(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Cover a square of 0.25 * level times the shorter side, around a random pixel, with gray."""
  return cover_square(image, round(0.125 * level * min(image.shape[:2])), bits)


def cutout_as_published(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Cover a square of 80 * level pixels around a random pixel with gray."""
  return cover_square(image, int(40 * level), bits)


RANDAUGMENT_OPS: dict[str, Operation] = {
  'AutoContrast': autocontrast,
  'Brightness': by_value(adjust_brightness),
  'Color': adjust_color,
  'Contrast': adjust_contrast,
  'Cutout': cutout,
  'Equalize': equalize,
  'Invert': by_value(invert),
  'Posterize': by_value(posterize),
  'Rotate': rotate,
  'Sharpness': adjust_sharpness,
  'ShearX': shear_x,
  'ShearY': shear_y,
  'Solarize': by_value(solarize),
  'SolarizeAdd': by_value(solarize_add),
  'TranslateX': translate_x,
  'TranslateY': translate_y,
}
RANDAUGMENT_VARIANTS = {
  'intended': RANDAUGMENT_OPS,
  'noisystudent': RANDAUGMENT_OPS
  | {
    'Contrast': adjust_contrast_as_published,
    'Cutout': cutout_as_published,
    'Posterize': by_value(posterize_as_published),
    'Solarize': by_value(solarize_as_published),
    'TranslateX': translate_x_as_published,
    'TranslateY': translate_y_as_published,
  },
}
