"""RandAugment as `randaug(n, m)` of google-research/big_vision computes it.

Its code is a copy of that of Noisy Student: see randaugment.py for what overflows in it. The
variant 'noisystudent' there draws the same operations, but it rounds gray, smooth and moved pixels
in its own way, and stays as it is for the runs that used it. The operations here follow the
rounding of TensorFlow: gray and blends are rounded down, coordinates are float32.

A magnitude of 0 changes the image: Posterize keeps one bit, Solarize inverts, Color and Contrast
remove 90 % of the difference to gray, and so on.

Operations are called as those of randaugment.py, with (image, level, bits).
"""

import cv2
import numpy as np

from vit_jax.data import randaugment as published
from vit_jax.data.pillow_ops import SMOOTH, blend, channel_ranges, map_values
from vit_jax.data.randaugment import (
  FILL_COLOR,
  RAMP,
  ImageArray,
  Operation,
  by_value,
  enhance_factor,
  randomly_negate,
)

# tf.image.rgb_to_grayscale rounds 255.5 / 255 times the weighted sum down. Neither a smaller
# precision than float64 nor rounding in between gives the same integers everywhere.
LUMA = np.array([[0.2989, 0.587, 0.114]]) * (255.5 / 255)
# A sum of integers / 13, rounded down: OpenCV rounds to the nearest integer.
SMOOTH_ROUND_DOWN = 0.5 / 13 - 0.5


def autocontrast(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Stretch each channel to the range 0 to 255, in float32."""
  low, high = channel_ranges(image).astype(np.float32)
  scale = np.float32(255) / np.where(high > low, high - low, 255)
  values = RAMP[0].astype(np.float32)
  return map_values(image, np.trunc(np.where(high > low, values * scale - low * scale, values)))


def adjust_color(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with the gray version of the image."""
  gray = cv2.transform(image.astype(np.float64), LUMA).astype(np.uint8)
  return blend(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), image, enhance_factor(level))


def adjust_sharpness(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Blend with a smoothed version of the image. The outermost pixels do not change."""
  smooth = image.copy()
  filtered = cv2.filter2D(image, -1, SMOOTH, delta=SMOOTH_ROUND_DOWN)
  smooth[1:-1, 1:-1] = filtered[1:-1, 1:-1]
  return blend(smooth, image, enhance_factor(level))


def transform(image: ImageArray, matrix: tuple[float, ...]) -> ImageArray:
  """Fill output (x, y) with the nearest pixel at (ax + by + c, dx + ey + f), or with gray.

  Coordinates are float32, halves are rounded away from 0, and pixel (0, 0) has its center at
  (0, 0), as in tfa.image.transform.
  """
  a, b, c, d, e, f = np.float32(matrix)
  h, w = image.shape[:2]
  x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
  source = np.empty((h, w, 2), np.int16)
  source[..., 0] = nearest(a * x + b * y + c if b else a * x + c)
  source[..., 1] = nearest(d * x + e * y + f if d else e * y + f)
  gray = {'borderMode': cv2.BORDER_CONSTANT, 'borderValue': FILL_COLOR}
  return cv2.remap(image, source, None, cv2.INTER_NEAREST, **gray)


def nearest(position: np.ndarray) -> np.ndarray:
  """Return the nearest integers of float32 numbers. Negative ones are outside the image.

  The sum is float64, because float32 would round it.
  """
  position = np.where(position == -0.5, np.float32(-1), position)
  return np.floor(position + np.float64(0.5)).astype(np.int16)


def rotate(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Rotate by 30 * level degrees about the center, in a random direction."""
  angle = np.float32(randomly_negate(30 * level, bits)) * np.float32(np.pi / 180)
  cos, sin = np.cos(angle), np.sin(angle)
  h, w = (np.float32(side - 1) for side in image.shape[:2])
  x, y = (w - (cos * w - sin * h)) / 2, (h - (sin * w + cos * h)) / 2
  return transform(image, (cos, -sin, x, sin, cos, y))


def shear_x(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift each row by 0.3 * level times its y, left or right."""
  return transform(image, (1, randomly_negate(0.3 * level, bits), 0, 0, 1, 0))


def shear_y(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift each column by 0.3 * level times its x, up or down."""
  return transform(image, (1, 0, 0, randomly_negate(0.3 * level, bits), 1, 0))


def translate_x(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 100 * level pixels, left or right."""
  return transform(image, (1, 0, randomly_negate(100 * level, bits), 0, 1, 0))


def translate_y(image: ImageArray, level: float, bits: int) -> ImageArray:
  """Shift by 100 * level pixels, up or down."""
  return transform(image, (1, 0, 0, 0, 1, randomly_negate(100 * level, bits)))


BIG_VISION_OPS: dict[str, Operation] = {
  'AutoContrast': autocontrast,
  'Equalize': published.equalize,
  'Invert': by_value(published.invert),
  'Rotate': rotate,
  'Posterize': by_value(published.posterize_as_published),
  'Solarize': by_value(published.solarize_as_published),
  'Color': adjust_color,
  'Contrast': published.adjust_contrast_as_published,
  'Brightness': by_value(published.adjust_brightness),
  'Sharpness': adjust_sharpness,
  'ShearX': shear_x,
  'ShearY': shear_y,
  'TranslateX': translate_x,
  'TranslateY': translate_y,
  'Cutout': published.cutout_as_published,
  'SolarizeAdd': by_value(published.solarize_add),
}
