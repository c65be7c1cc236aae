"""RandAugment as timm computes `rand-m9-mstd0.5-inc1`, the recipe of DeiT.

It applies a few operations from a table to a uint8 image [h, w, 3] on the host. Each is left out
with probability 1/2. Its magnitude is normal around that of the setting, limited to 0 to 10. A
larger magnitude always changes the image more. Pixels from outside the image have the mean color
that the model subtracts.

timm raises an error where Posterize keeps no bit, at a magnitude of 10. The image is black here.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vit_jax.data import pillow_ops as pillow
from vit_jax.data.pillow_ops import VALUES, ImageArray, map_values

MAX_MAGNITUDE = 10
MAGNITUDE_DEVIATION = 0.5  # mstd0.5.
# Interpolation of the moved pixels -> the filters to draw from.
RANDOM_INTERPOLATIONS = ('pil_bilinear', 'pil_bicubic')


class Draw(NamedTuple):
  """The random arguments of one operation."""

  name: str
  is_applied: bool
  level: float  # The magnitude / 10.
  sign: int
  interpolation: str


def draw_operation(bits: tuple[int, ...], *, magnitude: float, interpolation: str) -> Draw:
  """Return the random arguments of an operation from six uniform 64-bit integers.

  An `interpolation` of 'pil_random' is drawn from bilinear and bicubic, as in timm.
  """
  noise = math.sqrt(-2 * math.log(1 - unit(bits[2]))) * math.cos(2 * math.pi * unit(bits[3]))
  if interpolation == 'pil_random':
    interpolation = RANDOM_INTERPOLATIONS[bits[5] >> 63]
  return Draw(
    name=list(TIMM_OPS)[bits[0] % len(TIMM_OPS)],
    is_applied=bool(bits[1] >> 63),
    level=min(max(magnitude + MAGNITUDE_DEVIATION * noise, 0), MAX_MAGNITUDE) / MAX_MAGNITUDE,
    sign=1 if bits[4] >> 63 else -1,
    interpolation=interpolation,
  )


def unit(bits: int) -> float:
  """Return a number in [0, 1) from a uniform 64-bit integer."""
  return (bits >> 11) * 2**-53


def apply_operation(image: ImageArray, draw: Draw, fill: tuple[int, ...]) -> ImageArray:
  """Return the image after an operation. `fill` is the color outside the image."""
  return TIMM_OPS[draw.name](image, draw, fill) if draw.is_applied else image


def enhance_factor(draw: Draw) -> float:
  """Return the factor of a blend, 0.9 * level below or above 1, and at least 0.1."""
  return max(0.1, 1 + draw.sign * 0.9 * draw.level)


def solarize_add(image: ImageArray, level: float) -> ImageArray:
  """Add 110 * level to the values below 128."""
  brighter = np.minimum(VALUES + int(110 * level), 255)
  return map_values(image, np.where(VALUES < 128, brighter, VALUES))


def shear(image: ImageArray, draw: Draw, fill: tuple[int, ...], *, axis: int) -> ImageArray:
  """Shift rows (`axis` 0) or columns by 0.3 * level times their index."""
  factor = draw.sign * 0.3 * draw.level
  matrix = (1, factor, 0, 0, 1, 0) if axis == 0 else (1, 0, 0, factor, 1, 0)
  return pillow.warp_affine(image, matrix, draw.interpolation, fill)


def translate(image: ImageArray, draw: Draw, fill: tuple[int, ...], *, axis: int) -> ImageArray:
  """Shift rows (`axis` 0) or columns by 0.45 * level times their length."""
  pixels = draw.sign * 0.45 * draw.level * image.shape[1 - axis]
  matrix = (1, 0, pixels, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, pixels)
  return pillow.warp_affine(image, matrix, draw.interpolation, fill)


# Operation -> (image, its random arguments, color outside the image) -> image, in timm's order.
TIMM_OPS: dict[str, Callable[[ImageArray, Draw, tuple[int, ...]], ImageArray]] = {
  'AutoContrast': lambda image, draw, fill: pillow.autocontrast(image),
  'Equalize': lambda image, draw, fill: pillow.equalize(image),
  'Invert': lambda image, draw, fill: pillow.invert(image),
  'Rotate': lambda image, draw, fill: pillow.rotate(
    image, draw.sign * 30 * draw.level, draw.interpolation, fill
  ),
  'PosterizeIncreasing': lambda image, draw, fill: pillow.posterize(image, 4 - int(4 * draw.level)),
  'SolarizeIncreasing': lambda image, draw, fill: pillow.solarize(
    image, 256 - int(256 * draw.level)
  ),
  'SolarizeAdd': lambda image, draw, fill: solarize_add(image, draw.level),
  'ColorIncreasing': lambda image, draw, fill: pillow.saturation(image, enhance_factor(draw)),
  'ContrastIncreasing': lambda image, draw, fill: pillow.contrast(image, enhance_factor(draw)),
  'BrightnessIncreasing': lambda image, draw, fill: pillow.brightness(image, enhance_factor(draw)),
  'SharpnessIncreasing': lambda image, draw, fill: pillow.sharpness(image, enhance_factor(draw)),
  'ShearX': lambda image, draw, fill: shear(image, draw, fill, axis=0),
  'ShearY': lambda image, draw, fill: shear(image, draw, fill, axis=1),
  'TranslateXRel': lambda image, draw, fill: translate(image, draw, fill, axis=0),
  'TranslateYRel': lambda image, draw, fill: translate(image, draw, fill, axis=1),
}
