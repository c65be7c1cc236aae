"""RandAugment (arXiv 1909.13719) as Noisy Student noises its students (arXiv 1911.04252): some operations of a table, one after
another, all at one magnitude. Host only, on uint8 images [h, w, 3].

Operations, and what a magnitude means, are those of google-research/noisystudent but for two things: contrast is about the mean
of the image, where that code takes its number of pixels for it, and distances are shares of the image, not pixels. Places that
come from outside the image are grey.
"""

from collections.abc import Callable

import cv2
import numpy as np

MAGNITUDE_SCALE = (
  10.0  # Magnitudes that are 1 below. More is stronger: Noisy Student's largest has 27.
)
FILL_COLOR = (128, 128, 128)
LUMA_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)

ImageArray = np.ndarray


def rand_augment(
  image: ImageArray, bits: tuple[int, ...], *, count: int, magnitude: float
) -> ImageArray:
  """The image [h, w, 3] after `count` operations, each of which takes all that it draws from one of the 64-bit integers."""
  names = list(RANDAUGMENT_OPS)
  for draw in bits[:count]:
    image = RANDAUGMENT_OPS[names[draw % len(names)]](image, magnitude / MAGNITUDE_SCALE, draw)
  return image


def randomly_negate(amount: float, draw: int) -> float:
  """The amount, or as often its negative."""
  return amount if draw >> 63 else -amount


def blend(image: ImageArray, other: ImageArray, factor: float) -> ImageArray:
  """other + factor · (image - other): 1 is the image, 0 the other, more than 1 leads away from it."""
  mixed = other.astype(np.float32) + factor * (image.astype(np.float32) - other.astype(np.float32))
  return np.clip(mixed, 0, 255).astype(np.uint8)


def enhance_factor(share: float) -> float:
  """A factor of `blend`: at a magnitude of 5, it does nothing."""
  return 1.8 * share + 0.1


def autocontrast(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Each channel stretched to 0 and 255."""
  low, high = (f(image.reshape(-1, 3), axis=0).astype(np.float32) for f in (np.min, np.max))
  scale = 255 / np.where(high > low, high - low, 255)
  stretched = np.clip((image - low) * scale, 0, 255).astype(np.uint8)
  return np.where(high > low, stretched, image)


def equalize(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Each channel's histogram made flat."""
  return np.stack([_equalize_channel(image[..., i]) for i in range(3)], axis=-1)


def _equalize_channel(channel: np.ndarray) -> np.ndarray:
  histogram = np.bincount(channel.reshape(-1), minlength=256)
  step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
  if not step:
    return channel
  table = (np.cumsum(histogram) + step // 2) // step
  return np.clip(np.concatenate([[0], table[:-1]]), 0, 255).astype(np.uint8)[channel]


def invert(image: ImageArray, share: float, draw: int) -> ImageArray:
  """The negative."""
  return 255 - image


def posterize(image: ImageArray, share: float, draw: int) -> ImageArray:
  """The top 4·share bits of each channel: the weaker the magnitude, the fewer are left."""
  shift = 8 - min(8, int(4 * share))
  return (image >> shift) << shift if shift < 8 else np.zeros_like(image)


def solarize(image: ImageArray, share: float, draw: int) -> ImageArray:
  """The negative of what is at least as bright as 256·share."""
  return np.where(image < int(256 * share), image, 255 - image)


def solarize_add(image: ImageArray, share: float, draw: int) -> ImageArray:
  """110·share brighter where it is darker than 128."""
  brighter = np.clip(image.astype(np.int32) + int(110 * share), 0, 255).astype(np.uint8)
  return np.where(image < 128, brighter, image)


def adjust_color(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Between grey and more than its own colours."""
  grey = np.repeat((image.astype(np.float32) @ LUMA_WEIGHTS)[..., None], 3, axis=-1)
  return blend(image, grey.astype(np.uint8), enhance_factor(share))


def adjust_contrast(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Between its mean grey and more than its own contrast."""
  mean = int((image.astype(np.float32) @ LUMA_WEIGHTS).astype(np.uint8).mean() + 0.5)
  return blend(image, np.full_like(image, mean), enhance_factor(share))


def adjust_brightness(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Between black and more than its own light."""
  return blend(image, np.zeros_like(image), enhance_factor(share))


def adjust_sharpness(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Between smooth and more than its own edges; the border stays."""
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
  smooth = image.copy()
  if min(image.shape[:2]) > 2:
    smooth[1:-1, 1:-1] = np.clip(cv2.filter2D(image.astype(np.float32), -1, kernel), 0, 255)[
      1:-1, 1:-1
    ]
  return blend(image, smooth, enhance_factor(share))


def warp_affine(image: ImageArray, matrix: list[list[float]]) -> ImageArray:
  """Where each place of the result comes from is matrix · (x, y, 1); the nearest pixel, or grey."""
  matrix = np.array(matrix, np.float64)
  flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
  return cv2.warpAffine(
    image,
    matrix,
    image.shape[1::-1],
    flags=flags,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=FILL_COLOR,
  )


def rotate(image: ImageArray, share: float, draw: int) -> ImageArray:
  """By 30·share degrees about the middle."""
  angle = np.deg2rad(randomly_negate(30 * share, draw))
  cos, sin = np.cos(angle), np.sin(angle)
  (y, x) = ((side - 1) / 2 for side in image.shape[:2])
  return warp_affine(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def shear_x(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Rows shifted by 0.3·share of their height."""
  return warp_affine(image, [[1, randomly_negate(0.3 * share, draw), 0], [0, 1, 0]])


def shear_y(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Columns likewise."""
  return warp_affine(image, [[1, 0, 0], [randomly_negate(0.3 * share, draw), 1, 0]])


def translate_x(image: ImageArray, share: float, draw: int) -> ImageArray:
  """By 0.3·share of its width."""
  return warp_affine(
    image, [[1, 0, randomly_negate(round(0.3 * share * image.shape[1]), draw)], [0, 1, 0]]
  )


def translate_y(image: ImageArray, share: float, draw: int) -> ImageArray:
  """Of its height likewise."""
  return warp_affine(
    image, [[1, 0, 0], [0, 1, randomly_negate(round(0.3 * share * image.shape[0]), draw)]]
  )


def cutout(image: ImageArray, share: float, draw: int) -> ImageArray:
  """A grey square, of a side of 0.25·share of the shorter, around any pixel."""
  half = round(0.125 * share * min(image.shape[:2]))
  y, x = (
    (draw >> shift & 0xFFFF) * side >> 16
    for shift, side in zip((16, 32), image.shape[:2], strict=True)
  )
  image = image.copy()
  image[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL_COLOR
  return image


RANDAUGMENT_OPS: dict[str, Callable[[ImageArray, float, int], ImageArray]] = {
  'AutoContrast': autocontrast,
  'Brightness': adjust_brightness,
  'Color': adjust_color,
  'Contrast': adjust_contrast,
  'Cutout': cutout,
  'Equalize': equalize,
  'Invert': invert,
  'Posterize': posterize,
  'Rotate': rotate,
  'Sharpness': adjust_sharpness,
  'ShearX': shear_x,
  'ShearY': shear_y,
  'Solarize': solarize,
  'SolarizeAdd': solarize_add,
  'TranslateX': translate_x,
  'TranslateY': translate_y,
}
