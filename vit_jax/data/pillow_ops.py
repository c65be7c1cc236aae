"""Operations on pixels that compute what Pillow computes, mostly faster.

`tests/data/test_augment_parity.py` compares them with Pillow, and `benchmarks/augment.py` times
both. An operation that depends only on the value of a pixel is a table of 256 values for each
channel. The filters are OpenCV's. Affine transforms are Pillow's own: OpenCV rounds coordinates,
and its cubic kernel is another.

Images are uint8 [h, w, 3].
"""

import cv2
import numpy as np
from PIL import Image

ImageArray = np.ndarray

VALUES = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
FILTERS = {
  'pil_nearest': Image.Resampling.NEAREST,
  'pil_bilinear': Image.Resampling.BILINEAR,
  'pil_bicubic': Image.Resampling.BICUBIC,
}


def map_values(image: ImageArray, table: np.ndarray) -> ImageArray:
  """Replace each value by its entry in a table: [256] for all channels, or [256, 3]."""
  table = np.clip(table, 0, 255).astype(np.uint8)
  return cv2.LUT(image, table if table.ndim == 1 else table.reshape(1, 256, 3))


def luma(image: ImageArray) -> np.ndarray:
  """Return Pillow's mode L (ITU-R 601), uint8 [h, w]."""
  return np.asarray(Image.fromarray(image).convert('L'))


def grayscale(image: ImageArray) -> ImageArray:
  """Return the luma in each channel."""
  return cv2.cvtColor(luma(image), cv2.COLOR_GRAY2RGB)


def invert(image: ImageArray) -> ImageArray:
  """Invert all values."""
  return cv2.bitwise_not(image)


def solarize(image: ImageArray, threshold: int) -> ImageArray:
  """Invert the values that are at least `threshold`."""
  return map_values(image, np.where(threshold > VALUES, VALUES, 255 - VALUES))


def posterize(image: ImageArray, bits: int) -> ImageArray:
  """Keep the top `bits` bits of each value. Pillow refuses 0, for which this returns black."""
  shift = 8 - bits
  return map_values(image, VALUES >> shift << shift)


def channel_ranges(image: ImageArray) -> np.ndarray:
  """Return the smallest and the largest value of each channel, [2, 3]."""
  return np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T


def autocontrast(image: ImageArray) -> ImageArray:
  """Stretch each channel to the range 0 to 255."""
  low, high = channel_ranges(image).astype(np.float64)
  scale = 255 / np.where(high > low, high - low, 255)
  stretched = np.trunc(VALUES[:, None] * scale + -low * scale)
  return map_values(image, np.where(high > low, stretched, VALUES[:, None]))


def equalize(image: ImageArray) -> ImageArray:
  """Equalize the histogram of each channel."""
  counts = [cv2.calcHist([image], [i], None, [256], [0, 256]) for i in range(3)]
  return map_values(image, np.stack([equalizing_table(each.ravel()) for each in counts], axis=1))


def equalizing_table(histogram: np.ndarray) -> np.ndarray:
  """Return the values [256] that equalize a histogram [256]."""
  histogram = histogram.astype(np.int64)
  step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
  if not step:
    return VALUES
  below = np.concatenate([[0], np.cumsum(histogram)[:-1]])
  return (below + step // 2) // step


def blend(other: ImageArray, image: ImageArray, factor: float) -> ImageArray:
  """Return other + factor * (image - other), rounded down and clipped."""
  if factor in (0.0, 1.0):
    return image if factor else other
  # In the order of Pillow's arithmetic, so that every pixel is equal.
  start, mixed = other.astype(np.float32), image.astype(np.float32)
  mixed -= start
  mixed *= np.float32(factor)
  mixed += start
  if factor > 1:
    np.clip(mixed, 0, 255, out=mixed)
  return mixed.astype(np.uint8)


def brightness(image: ImageArray, factor: float) -> ImageArray:
  """Blend with black."""
  return map_values(image, np.trunc(np.float32(factor) * VALUES.astype(np.float32)))


def contrast(image: ImageArray, factor: float) -> ImageArray:
  """Blend with the mean luma."""
  return map_values(image, blend_values(int(cv2.mean(luma(image))[0] + 0.5), factor))


def blend_values(gray: int, factor: float) -> np.ndarray:
  """Return the table of a blend with a constant gray."""
  gray, factor = np.float32(gray), np.float32(factor)
  return np.trunc(np.clip(gray + factor * (VALUES.astype(np.float32) - gray), 0, 255))


def saturation(image: ImageArray, factor: float) -> ImageArray:
  """Blend with the luma. Pillow and timm call it Color."""
  return blend(grayscale(image), image, factor)


def sharpness(image: ImageArray, factor: float) -> ImageArray:
  """Blend with a smoothed version of the image. The outermost pixels do not change."""
  smooth = image.copy()
  smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
  return blend(smooth, image, factor)


def gaussian_blur(image: ImageArray, radius: float) -> ImageArray:
  """Blur with a Gaussian of this standard deviation, as three box filters along each axis.

  A box has a fractional width (Gwosdek et al., 2011). Each pass rounds to integers.
  """
  variance = radius**2 / 3
  full = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # Whole pixels on each side.
  part = (2 * full + 1) * (full * (full + 1) - 3 * variance)
  part /= 6 * (variance - (full + 1) ** 2)
  box = np.full(2 * int(full) + 3, 1 / (2 * (full + part) + 1), np.float32)
  box[[0, -1]] *= part
  for kernel in 3 * [box[None]] + 3 * [box[:, None]]:
    image = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
  return image


def warp_affine(
  image: ImageArray, matrix: tuple[float, ...], interpolation: str, fill: tuple[int, ...]
) -> ImageArray:
  """Fill each pixel from its source position, or with `fill` if that is outside the image.

  `matrix` is (a, b, c, d, e, f): the source of (x, y) is (ax + by + c, dx + ey + f), where pixel
  (0, 0) has its center at (0.5, 0.5).
  """
  out = Image.fromarray(image).transform(
    image.shape[1::-1],
    Image.Transform.AFFINE,
    matrix,
    FILTERS[interpolation],
    fillcolor=fill,
  )
  return np.asarray(out)


def rotate(
  image: ImageArray, degrees: float, interpolation: str, fill: tuple[int, ...]
) -> ImageArray:
  """Rotate counterclockwise about the center."""
  out = Image.fromarray(image).rotate(degrees, FILTERS[interpolation], fillcolor=fill)
  return np.asarray(out)
