"""Crop, resize and augment one image on the host.

An image is the bytes of a file or an array; the result is uint8 [h, w, 3] RGB or [h, w, 1] grey.
All randomness of a training image comes from its key (seed, epoch, example). With repeated
augmentation, the number of the draw stands for the epoch.

A grey image has three equal channels until it is written: every step treats them alike.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from vit_jax.data.augment import INTERPOLATION_BLOCK, uniform
from vit_jax.data.decode import CropBox, ImageData, decode_image
from vit_jax.data.pillow_ops import grayscale
from vit_jax.data.preprocessing import Preprocessing, apply_preprocessing, resized_size
from vit_jax.data.resize import resize_image
from vit_jax.data.sampler import RandomKey, random_bits
from vit_jax.data.timm_randaugment import RANDOM_INTERPOLATIONS

# Increase this when a training image changes for the same bytes and key. Runs that recorded
# another version do not resume.
AUGMENTATION_VERSION = 1
# As in torchvision's RandomResizedCrop.
MAX_RESIZED_CROP_ATTEMPTS = 10
# As in TensorFlow's sample_distorted_bounding_box. After these, the box is the full image.
MAX_CROP_ATTEMPTS = 100
REFLECTED_PIXELS = 4  # Around the image, before the 'simple' crop.


def write_train_image(
  data: ImageData,
  out: np.ndarray,
  *,
  name: str,
  key: RandomKey,
  crop: str,
  area: tuple[float, float],
  aspect: tuple[float, float],
  side: int,
  augment: Callable[[np.ndarray, RandomKey], np.ndarray] | None = None,
  flip: bool,
  interpolation: str = 'tf_bilinear',
  decoding: dict[str, int],
):
  """Write an augmented training image into `out`, uint8 [h, w, 3] or grey [h, w, 1].

  Args:
    data: The image, as in `decode_image`.
    out: The array to write.
    name: Identifies the image in error messages.
    key: (seed, epoch, example), the source of all randomness.
    crop: 'resize' is no crop. 'random' crops at random after resizing to `side` x `side` pixels.
      Others are `sample_crop_box`, `sample_resized_crop_box` and `simple_random_crop`.
    area: Smallest and largest area of a random box, as a fraction of the image.
    aspect: Smallest and largest width / height of a random box.
    side: Pixels, used by 'random'.
    augment: Maps the cropped image and the key to the augmented image, as in augment.py.
    flip: Flip half of the images left-right.
    interpolation: As in resize.py, or 'pil_random': bilinear or bicubic, each for half the images.
    decoding: `max_pixels`, and `fast_dct` and `orient` if they are not the default.

  Raises BadImageError if the image cannot be decoded.
  """
  box, size = None, out.shape[:2]
  if crop in SAMPLE_BOX:
    box = functools.partial(SAMPLE_BOX[crop], key=key, area=area, aspect=aspect)
  image = decode_channels(data, out.shape[2], name=name, box=box, **decoding)
  interpolation = draw_interpolation(interpolation, key)
  if crop == 'random':
    image = random_crop(resize_image(image, (side, side), interpolation), size, key=key)
  elif crop == 'simple':
    image = simple_random_crop(image, size, interpolation, key=key)
  with three_channels(out) as rgb:
    if flip and random_bits(key, 0)[-1] >> 63:
      cv2.flip(resize_image(image, size, interpolation), 1, dst=rgb)
    else:
      resize_image(image, size, interpolation, rgb)
    if augment:
      rgb[...] = augment(rgb, key)


def draw_interpolation(interpolation: str, key: RandomKey) -> str:
  """Return the interpolation, or one of two at random for 'pil_random'."""
  if interpolation != 'pil_random':
    return interpolation
  return RANDOM_INTERPOLATIONS[random_bits(key, INTERPOLATION_BLOCK)[0] >> 63]


def write_eval_image(
  data: ImageData,
  out: np.ndarray,
  *,
  name: str,
  steps: Preprocessing,
  user_file: bool,
  max_pixels: int,
):
  """Write an evaluation image into `out` [h, w, c]: rounded if it is uint8, exact if float32.

  Args:
    data: The image, as in `decode_image`.
    out: The array to write.
    name: Identifies the image in error messages.
    steps: The preprocessing.
    user_file: As in `Preprocessing.decoding`.
    max_pixels: As in `decode_image`.

  Raises BadImageError if the image cannot be decoded.
  """
  options = steps.decoding(user_file=user_file)
  image = decode_channels(data, steps.channels, name=name, max_pixels=max_pixels, **options)
  with three_channels(out) as rgb:
    apply_preprocessing(image, steps, rgb)


def decode_channels(data: ImageData, channels: int, **options) -> np.ndarray:
  """Decode as `decode_image` does, and convert to grey for one channel. Returns uint8 [h, w, 3]."""
  image = decode_image(data, **options)
  return grayscale(image) if channels == 1 else image


@contextlib.contextmanager
def three_channels(out: np.ndarray) -> Iterator[np.ndarray]:
  """Yield `out`, or [h, w, 3] of which the first channel is copied to `out` [h, w, 1]."""
  if out.shape[2] == 3:
    yield out
  else:
    rgb = np.empty((*out.shape[:2], 3), out.dtype)
    yield rgb
    out[...] = rgb[..., :1]


def sample_crop_box(
  height: int, width: int, *, key: RandomKey, area: tuple[float, float], aspect: tuple[float, float]
) -> CropBox:
  """Sample a crop box as TensorFlow's sample_distorted_bounding_box does without objects.

  It draws an aspect ratio first, then a height for which the area is in range.

  Args:
    height: Pixels of the image.
    width: Pixels of the image.
    key: (seed, epoch, example).
    area: Smallest and largest area of the box, as a fraction of the image.
    aspect: Smallest and largest width / height of the box.
  """
  area = [fraction * height * width for fraction in area]
  for attempt in range(MAX_CROP_ATTEMPTS):
    aspect_bits, height_bits, y_bits, x_bits = random_bits(key, attempt)[:4]
    ratio = aspect[0] + (aspect_bits >> 11) * 2**-53 * (aspect[1] - aspect[0])
    h, w = _sample_box_size(height, width, ratio, area, height_bits)
    if h and w:
      return _scale_bits(y_bits, height - h), _scale_bits(x_bits, width - w), h, w
  return 0, 0, height, width


def sample_resized_crop_box(
  height: int, width: int, *, key: RandomKey, area: tuple[float, float], aspect: tuple[float, float]
) -> CropBox:
  """Sample a crop box as torchvision's RandomResizedCrop does. Arguments as `sample_crop_box`.

  The area and the logarithm of the aspect ratio are uniform. If no box fits, it is the largest in
  the center with an aspect ratio in range.
  """
  for attempt in range(MAX_RESIZED_CROP_ATTEMPTS):
    area_bits, aspect_bits, y_bits, x_bits = random_bits(key, attempt)[:4]
    pixels = uniform(area_bits, *area) * height * width
    ratio = math.exp(uniform(aspect_bits, *map(math.log, aspect)))
    h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
    if 0 < h <= height and 0 < w <= width:
      return _scale_bits(y_bits, height - h + 1), _scale_bits(x_bits, width - w + 1), h, w
  h = min(height, round(width / aspect[0]))
  w = min(width, round(height * aspect[1]))
  return (height - h) // 2, (width - w) // 2, h, w


SAMPLE_BOX = {'inception': sample_crop_box, 'random_resized': sample_resized_crop_box}


def random_crop(image: np.ndarray, size: tuple[int, int], *, key: RandomKey) -> np.ndarray:
  """Crop (height, width) = `size` at a uniformly random position."""
  bits = random_bits(key, 0)
  y, x = (_scale_bits(bits[i], image.shape[i] - size[i] + 1) for i in range(2))
  return image[y : y + size[0], x : x + size[1]]


def simple_random_crop(
  image: np.ndarray, size: tuple[int, int], interpolation: str, *, key: RandomKey
) -> np.ndarray:
  """Crop at random after the image has been scaled to cover `size` and padded by reflection.

  This is the simple random crop of DeiT III (arXiv 2204.07118).
  """
  covering = Preprocessing(size=size, crop='center', resize_size=size, rounding='timm')
  image = resize_image(image, resized_size(image.shape[:2], covering), interpolation)
  pad = [REFLECTED_PIXELS] * 4
  return random_crop(cv2.copyMakeBorder(image, *pad, cv2.BORDER_REFLECT_101), size, key=key)


def _sample_box_size(
  height: int, width: int, ratio: float, area: list[float], bits: int
) -> tuple[int, int]:
  """Return (h, w) of a box with w / h = `ratio` and an area in [low, high] pixels.

  Returns (0, 0) if rounding makes that impossible.
  """
  low, high = area
  h = round(math.sqrt(low / ratio))
  max_h = round(math.sqrt(high / ratio))
  if round(max_h * ratio) > width:
    max_h = int((width + 0.5 - 1e-7) / ratio)
    max_h -= round(max_h * ratio) > width
  max_h = min(max_h, height)
  h = max_h if h >= max_h else h + _scale_bits(bits, max_h - h + 1)
  h += h * round(h * ratio) < low
  h -= h * round(h * ratio) > high
  w = round(h * ratio)
  fits = low <= h * w <= high and 0 < w <= width and 0 < h <= height
  return (h, w) if fits else (0, 0)


def _scale_bits(bits: int, n: int) -> int:
  """Map 64 uniform bits to a uniform integer in [0, n), or to 0 if n is 0."""
  return bits * n >> 64
