"""Resize an image with the interpolation of the library that a model was trained with.

`tf_bilinear` is tf.image.resize: bilinear, half-pixel centers, no antialiasing. `tf_area` is
big_vision's default: the mean over the area of an output pixel, truncated to an integer.
`pil_NAME` is Pillow's filter NAME, which is antialiased and rounds to uint8; torchvision and
transformers call it for images of Pillow.

Images are uint8 [h, w, 3]. A region is (y, x, h, w) in pixels of the resized image.
"""

import math

import cv2
import numpy as np
from PIL import Image

from vit_jax.settings.limits import CHOICES

INTERPOLATIONS = CHOICES['data.interpolation']
# If an image or its resized copy has more pixels, only the pixels that the region needs are
# converted to float32 or resized. The result then differs in the last digits.
MAX_FULL_RESIZE_PIXELS = 2**24
MAX_FILTER_SUPPORT = 3  # Radius of Pillow's widest filter, Lanczos, in pixels of the coarser grid.
AREA_EPSILON = 1e-3  # A mean of 128 that float32 computes as 127.9999 is not truncated to 127.

Region = tuple[int, int, int, int]


def resize_image(
  image: np.ndarray,
  size: tuple[int, int],
  interpolation: str = 'tf_bilinear',
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Resize to (height, width), into `out` if it is given.

  The result is uint8, or float32 if `out` is. Only `tf_bilinear` then has fractions.

  `tf_bilinear` agrees with tf.image.resize to 0.01 of 255 on float32 and to one level on uint8.
  """
  out = np.empty((*size, 3), np.uint8) if out is None else out
  if image.shape[:2] == size:
    np.copyto(out, image)
  elif interpolation == 'tf_bilinear' and _is_large(image.shape[:2], size):
    _write_values(_resize_region_tf(image, size, (0, 0, *size), interpolation), out)
  elif interpolation == 'tf_bilinear':
    source = image.astype(out.dtype, copy=False)
    cv2.resize(source, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)
  elif interpolation == 'tf_area':
    _write_values(_average_areas(image, size), out)
  else:
    np.copyto(out, _resize_pillow(image, size, interpolation))
  return out


def write_resized_region(
  image: np.ndarray, size: tuple[int, int], region: Region, interpolation: str, out: np.ndarray
):
  """Resize to (height, width) and write the region of it into `out`, uint8 or float32 [h, w, 3].

  Memory is bounded by `MAX_FULL_RESIZE_PIXELS`, however large the resized image would be. Beyond
  it, filters with jumps (nearest, box) may take a neighboring pixel at a jump.
  """
  y, x, h, w = region
  if image.shape[:2] == size:
    np.copyto(out, image[y : y + h, x : x + w])
  elif region == (0, 0, *size) and size[0] * size[1] <= MAX_FULL_RESIZE_PIXELS:
    if out.flags.c_contiguous:
      resize_image(image, size, interpolation, out)
    else:
      np.copyto(out, resize_image(image, size, interpolation, np.empty(out.shape, out.dtype)))
  elif size[0] * size[1] <= MAX_FULL_RESIZE_PIXELS:
    resized = resize_image(image, size, interpolation, np.empty((*size, 3), out.dtype))
    np.copyto(out, resized[y : y + h, x : x + w])
  elif interpolation.startswith('tf_'):
    _write_values(_resize_region_tf(image, size, region, interpolation), out)
  else:
    np.copyto(out, _resize_region_pillow(image, size, region, interpolation))


def _is_large(*sizes: tuple[int, int]) -> bool:
  return any(h * w > MAX_FULL_RESIZE_PIXELS for h, w in sizes)


def _write_values(values: np.ndarray, out: np.ndarray):
  """Write float32 values into `out`, rounded if it is uint8."""
  np.copyto(out, values if out.dtype == np.float32 else np.rint(values).astype(np.uint8))


def _average_areas(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Return the mean over the area of each output pixel, cut to an integer, float32 [h, w, 3].

  OpenCV's area interpolation is this mean if no axis grows.
  """
  if size[0] > image.shape[0] or size[1] > image.shape[1]:
    return _resize_region_tf(image, size, (0, 0, *size), 'tf_area')
  means = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
  return np.floor(means + AREA_EPSILON)


def _pillow_filter(interpolation: str) -> Image.Resampling:
  return Image.Resampling[interpolation.removeprefix('pil_').upper()]


def _resize_pillow(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize(size[::-1], _pillow_filter(interpolation)))


def _resize_region_pillow(
  image: np.ndarray, size: tuple[int, int], region: Region, interpolation: str
) -> np.ndarray:
  """Resize only the pixels that the region is computed from.

  They are cut out first, because Pillow stores the corners of a box in float32.
  """
  spans = [
    _source_span(n, m, start, count)
    for n, m, start, count in zip(image.shape, size, region[:2], region[2:], strict=False)
  ]
  (top, y0, y1, bottom), (left, x0, x1, right) = spans
  part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
  return np.asarray(part.resize(region[:1:-1], _pillow_filter(interpolation), box=(x0, y0, x1, y1)))


def _source_span(n: int, resized: int, start: int, count: int) -> tuple[int, float, float, int]:
  """Return (first, low, high, last) of `count` resized pixels from `start` along an axis.

  They cover [low, high) of the source, relative to `first`. Their filters read [first, last).
  """
  scale = n / resized
  margin = math.ceil(MAX_FILTER_SUPPORT * max(scale, 1)) + 1
  low, high = start * scale, min(n, (start + count) * scale)
  first, last = max(0, math.floor(low) - margin), min(n, math.ceil(high) + margin)
  return first, low - first, high - first, last


def _resize_region_tf(
  image: np.ndarray, size: tuple[int, int], region: Region, interpolation: str
) -> np.ndarray:
  """Return a region of the resized image, float32 [h, w, 3], from the pixels that it needs."""
  weights = {'tf_bilinear': _bilinear_taps, 'tf_area': _area_taps}[interpolation]
  for axis in range(2):
    taps, factors = weights(image.shape[axis], size[axis], region[axis], region[2 + axis])
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    image = sum(
      np.take(image, tap, axis) * factor.reshape(shape)
      for tap, factor in zip(taps, factors, strict=True)
    )
  return np.floor(image + AREA_EPSILON) if interpolation == 'tf_area' else image


def _bilinear_taps(n: int, resized: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the source indices [2, count] of output pixels, and their weights."""
  x = (np.arange(start, start + count) + 0.5) * (n / resized) - 0.5
  low = np.floor(x)
  taps = np.clip([low, low + 1], 0, n - 1).astype(np.int64)
  return taps, np.asarray([low + 1 - x, x - low], np.float32)


def _area_taps(n: int, resized: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the source indices [k, count] that output pixels cover, and their weights."""
  scale = n / resized
  low = np.arange(start, start + count) * scale
  taps = np.floor(low) + np.arange(math.ceil(scale) + 1)[:, None]
  covered = np.minimum(low + scale, taps + 1) - np.maximum(low, taps)
  weights = np.maximum(covered, 0) / scale
  return np.minimum(taps, n - 1).astype(np.int64), weights.astype(np.float32)
