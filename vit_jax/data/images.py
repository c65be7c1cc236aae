"""Decode, crop, resize and augment one image on the host.

An image is the bytes of a file or an array; the result is uint8 [h, w, 3] RGB. All randomness of a
training image comes from its key (seed, epoch, example).
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from vit_jax.data.randaugment import rand_augment
from vit_jax.data.sampler import RandomKey, random_bits
from vit_jax.errors import UserError, one_line

CropBox = tuple[int, int, int, int]  # (y, x, h, w) in pixels.
ChooseBox = Callable[[int, int], CropBox]  # (height, width) of an image -> box.
ImageData = bytes | np.ndarray

# Increase this when a training image changes for the same bytes and key. Runs that recorded
# another version do not resume.
AUGMENTATION_VERSION = 1
# As in TensorFlow's sample_distorted_bounding_box. After these, the box is the full image.
MAX_CROP_ATTEMPTS = 100
# Trailing shape of an OpenCV image -> the conversion to RGB or RGBA.
TO_RGB_CODES = {(): cv2.COLOR_GRAY2RGB, (3,): cv2.COLOR_BGR2RGB, (4,): cv2.COLOR_BGRA2RGBA}


class BadImageError(UserError):
  """An image that cannot be read. Picklable, so that worker processes can return it."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)

  def __str__(self) -> str:
    name, reason = self.args
    return (
      f'{name}: {reason}. Replace or remove the file, or skip unreadable images with '
      '--config.data.bad_images=skip'
    )


class JpegHeader(NamedTuple):
  """The fields of a JPEG header that decoding a part of the image needs."""

  height: int
  width: int
  height_offset: int  # Position in the file of the two bytes that hold the height.
  mcu_rows: int  # Pixel rows coded as one unit; 0 if the file is not a single top-to-bottom scan.


def decode_image(
  data: ImageData, *, name: str, max_pixels: int, box: ChooseBox | None = None
) -> np.ndarray:
  """Decode an image, or only the box that `box(height, width)` returns.

  EXIF orientation is ignored, as in the pipelines that the released models were trained and
  evaluated with.

  Args:
    data: The bytes of an image file, or pixels uint8 [h, w], [h, w, 1] or [h, w, 3].
    name: Identifies the image in error messages.
    max_pixels: Images with more pixels are refused before they are decoded.
    box: Chooses the part of the image to return.

  Returns:
    uint8 [h, w, 3] RGB.

  Raises BadImageError if the image cannot be decoded.
  """
  try:
    if isinstance(data, np.ndarray):
      return _crop_to_box(_decode_array(data), box)
    if data[:3] == b'\xff\xd8\xff':
      return _decode_jpeg(data, max_pixels, box)
    return _crop_to_box(_decode_with_pillow(data, max_pixels), box)
  except Exception as error:  # Decoders raise ValueError, cv2.error, OSError, SyntaxError, …
    raise BadImageError(name, _describe_decode_error(data, error)) from error


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
  operations: int,
  magnitude: float,
  flip: bool,
  max_pixels: int,
):
  """Write an augmented training image into `out`, uint8 [h, w, 3].

  Args:
    data: The image, as in `decode_image`.
    out: The array to write.
    name: Identifies the image in error messages.
    key: (seed, epoch, example), the source of all randomness.
    crop: 'inception' resizes a random box, 'resize' the full image. 'random' resizes the full
      image to `side` x `side` pixels and crops at random.
    area: Smallest and largest area of the 'inception' box, as a fraction of the image.
    aspect: Smallest and largest width / height of the 'inception' box.
    side: Pixels, used by 'random'.
    operations: Number of RandAugment operations.
    magnitude: RandAugment's magnitude.
    flip: Flip half of the images left-right.
    max_pixels: As in `decode_image`.

  Raises BadImageError if the image cannot be decoded.
  """
  box = None
  if crop == 'inception':
    box = lambda h, w: sample_crop_box(h, w, key=key, area=area, aspect=aspect)
  image = decode_image(data, name=name, max_pixels=max_pixels, box=box)
  if crop == 'random':
    image = random_crop(resize_bilinear(image, (side, side)), out.shape[:2], key=key)
  if flip and random_bits(key, 0)[-1] >> 63:
    cv2.flip(resize_bilinear(image, out.shape[:2]), 1, dst=out)
  else:
    resize_bilinear(image, out.shape[:2], out)
  if operations:
    bits = random_bits(key, MAX_CROP_ATTEMPTS)  # The blocks before it belong to the crop.
    out[...] = rand_augment(out, bits, count=operations, magnitude=magnitude)


def write_eval_image(
  data: ImageData, out: np.ndarray, *, name: str, crop: str, short_side: int, max_pixels: int
):
  """Write an evaluation image into `out` [h, w, 3]: rounded if it is uint8, exact if float32.

  Args:
    data: The image, as in `decode_image`.
    out: The array to write.
    name: Identifies the image in error messages.
    crop: 'resize' resizes the full image. 'center' resizes its short side to `short_side` and
      crops the center.
    short_side: Pixels, used by 'center'.
    max_pixels: As in `decode_image`.

  Raises BadImageError if the image cannot be decoded.
  """
  image = decode_image(data, name=name, max_pixels=max_pixels).astype(out.dtype, copy=False)
  if crop != 'center':
    resize_bilinear(image, out.shape[:2], out)
    return
  scale = short_side / min(image.shape[:2])
  size = tuple(max(short_side, round(n * scale)) for n in image.shape[:2])
  image = resize_bilinear(image, size)
  y, x = ((n - m) // 2 for n, m in zip(size, out.shape[:2], strict=True))
  out[...] = image[y : y + out.shape[0], x : x + out.shape[1]]


def resize_bilinear(
  image: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
  """Resize to (height, width) bilinearly, with half-pixel centers and without antialiasing.

  Agrees with tf.image.resize to 0.01 of 255 on float32 and to one level on uint8.
  """
  if image.shape[:2] == size and out is not None:
    np.copyto(out, image)
    return out
  return cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)


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


def random_crop(image: np.ndarray, size: tuple[int, int], *, key: RandomKey) -> np.ndarray:
  """Crop (height, width) = `size` at a uniformly random position."""
  bits = random_bits(key, 0)
  y, x = (_scale_bits(bits[i], image.shape[i] - size[i] + 1) for i in range(2))
  return image[y : y + size[0], x : x + size[1]]


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


def _crop_to_box(image: np.ndarray, box: ChooseBox | None) -> np.ndarray:
  if box is None:
    return image
  y, x, h, w = box(*image.shape[:2])
  return image[y : y + h, x : x + w]


def _decode_array(pixels: np.ndarray) -> np.ndarray:
  channels = pixels.shape[2:]
  valid = pixels.dtype == np.uint8 and pixels.ndim >= 2 and channels in ((), (1,), (3,))
  if not valid or not pixels.size:
    got = f'{pixels.dtype} {list(pixels.shape)}'
    raise ValueError(f'expected uint8 pixels [h, w], [h, w, 1] or [h, w, 3], got {got}')
  return pixels if channels == (3,) else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def _decode_jpeg(data: bytes, max_pixels: int, box: ChooseBox | None) -> np.ndarray:
  """Decode a JPEG down to the last row of the box.

  The height in the header is replaced by the last row needed, so the decoder stops there.
  """
  header = _read_jpeg_header(data)
  _check_pixel_count(header.height, header.width, max_pixels)
  y, x, h, w = box(header.height, header.width) if box else (0, 0, header.height, header.width)
  rows, at = header.height, header.height_offset
  if header.mcu_rows:
    # One unit more than the box needs, because chroma is interpolated with the following row.
    rows = min(rows, (-(-(y + h) // header.mcu_rows) + 1) * header.mcu_rows)
    data = b''.join((data[:at], rows.to_bytes(2), data[at + 2 :]))
  image = np.empty((rows, header.width, 3), np.uint8)
  try:
    # TensorFlow's default decoder settings; the result is equal to the bit.
    simplejpeg.decode_jpeg(data, 'RGB', fastdct=True, buffer=image)
  except ValueError as error:
    # After the last row the decoder expects the end of the file, but finds the remaining rows.
    # libjpeg reports the first of several problems, so a file that is truncated or corrupt above
    # that point gives another message.
    if 'extraneous bytes before marker 0xd9' not in str(error):
      raise
  return image[y : y + h, x : x + w]


def _read_jpeg_header(data: bytes) -> JpegHeader:
  """Read the segments up to the first scan."""
  at, frame, restarts = 2, 0, False
  while data[at + 1] != 0xDA:
    marker = data[at + 1]
    if data[at] != 0xFF:
      raise ValueError('the JPEG is corrupt: a marker is missing')
    if marker == 0xFF:  # Padding.
      at += 1
      continue
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      frame = at
    restarts |= marker == 0xDD
    at += 2 + int.from_bytes(data[at + 2 : at + 4])
  height, width, components = struct.unpack_from('>HHB', data, frame + 5)
  one_scan = data[frame + 1] in (0xC0, 0xC1) and data[at + 4] == components and not restarts
  mcu_rows = 8 * max(data[i] & 15 for i in range(frame + 11, frame + 11 + 3 * components, 3))
  return JpegHeader(height, width, frame + 5, mcu_rows if one_scan else 0)


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
  """Decode the first frame of a file in any format that Pillow reads."""
  Image.MAX_IMAGE_PIXELS = None  # Ours is config.data.max_pixels; Pillow's limit differs.
  # Opening reads only the headers, so the size is checked before pixels are allocated.
  with Image.open(io.BytesIO(data)) as image:
    _check_pixel_count(image.height, image.width, max_pixels)
    if image.format == 'PNG':
      _check_png_checksums(data)
    image.load()
    if image.format == 'PNG' and data[24] == 16:
      return _convert_16_bit(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    if image.mode.startswith('I;16'):
      return _convert_16_bit(np.asarray(image))
    if image.has_transparency_data:
      return _composite_on_white(np.asarray(image.convert('RGBA')))
    return np.asarray(image.convert('RGB'))


def _check_png_checksums(data: bytes):
  """Check the checksums of the critical chunks, because Pillow ignores those of the pixels."""
  at, kind = 8, b''
  while kind != b'IEND':
    length, kind = struct.unpack_from('>I4s', data, at)
    (checksum,) = struct.unpack_from('>I', data, at + 8 + length)
    if kind[:1].isupper() and zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != checksum:
      chunk = kind.decode(errors='replace')
      raise ValueError(f'the PNG is corrupt: the checksum of its {chunk} chunk does not match')
    at += 12 + length


def _convert_16_bit(image: np.ndarray) -> np.ndarray:
  """Convert an OpenCV image of 16 bits per channel to 8-bit RGB, rounding to nearest.

  Pillow drops the low byte, or clips.
  """
  image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
  image = cv2.cvtColor(image, TO_RGB_CODES[image.shape[2:]])
  return image if image.shape[2] == 3 else _composite_on_white(image)


def _composite_on_white(image: np.ndarray) -> np.ndarray:
  """Convert RGBA to RGB on a white background.

  The colors of transparent pixels are arbitrary, often black.
  """
  color, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _check_pixel_count(height: int, width: int, max_pixels: int):
  if not height or not width:
    raise ValueError('the header declares no pixels')
  if height * width > max_pixels:
    raise ValueError(f'{height} x {width} pixels exceed config.data.max_pixels={max_pixels}')


def _describe_decode_error(data: ImageData, error: Exception) -> str:
  if not isinstance(data, np.ndarray) and not data:
    return 'the file is empty'
  if isinstance(error, (IndexError, struct.error)):
    return 'the file is truncated'
  text = one_line(error)
  return 'the image format is unknown' if 'cannot identify image file' in text else text
