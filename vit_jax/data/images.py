"""One image: bytes or an array -> uint8 [h, w, c] RGB, the random box of a training image, resizing. Host only.

Everything random about a training image is drawn from its key (seed, epoch, example) and from nothing else.
"""

import hashlib
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
from vit_jax.errors import UserError

ImageKey = tuple[int, int, int]  # seed, epoch, example.
CropBox = tuple[int, int, int, int]  # y, x, h, w in pixels.
ChooseBox = Callable[[int, int], CropBox]  # Of an image of a height and width.
ImageData = bytes | np.ndarray

AUGMENTATION_VERSION = (
  1  # The version of what a training image is of its bytes and key: runs of another do not go on.
)
MAX_CROP_ATTEMPTS = 100  # TensorFlow's sample_distorted_bounding_box: then the whole image.
TO_RGB_CODES = {
  (): cv2.COLOR_GRAY2RGB,
  (3,): cv2.COLOR_BGR2RGB,
  (4,): cv2.COLOR_BGRA2RGBA,
}  # By the channels.


class BadImageError(UserError):
  """An image that cannot be read. It crosses process borders by its two arguments."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)

  def __str__(self) -> str:
    name, reason = self.args
    return f'{name}: {reason}. Replace or remove the file, or leave such images out with --config.data.bad_images=skip'


class JpegHeader(NamedTuple):
  """What the headers of a JPEG say."""

  height: int
  width: int
  height_at: int  # Where the two bytes of the height lie.
  strip: int  # Rows that are coded together; 0 if not in one pass from top to bottom.


def decode_image(
  data: ImageData, *, name: str, max_pixels: int, box: ChooseBox | None = None
) -> np.ndarray:
  """The image in `data`, uint8 [h, w, 3] RGB; of it only what `box(height, width)` chooses, if given.

  Data are the bytes of a file of any usual format, or pixels, uint8 [h, w], [h, w, 1] or [h, w, 3]. An EXIF
  orientation is left unheeded, as in the pipelines that the released models were trained and evaluated with.
  BadImage for all that fails.
  """
  try:
    if isinstance(data, np.ndarray):
      return _crop_to_box(_decode_array(data), box)
    if data[:3] == b'\xff\xd8\xff':
      return _decode_jpeg(data, max_pixels, box)
    return _crop_to_box(_decode_with_pillow(data, max_pixels), box)
  except (
    Exception
  ) as error:  # The decoders raise what they like: ValueError, cv2.error, OSError, SyntaxError, …
    raise BadImageError(name, _describe_decode_error(data, error)) from error


def write_train_image(
  data: ImageData,
  out: np.ndarray,
  *,
  name: str,
  key: ImageKey,
  crop: str,
  area: tuple[float, float],
  aspect: tuple[float, float],
  side: int,
  operations: int,
  magnitude: float,
  flip: bool,
  max_pixels: int,
):
  """Writes a training image into `out`, uint8 [h, w, 3]: a random box ('inception') or the whole ('resize'), resized; or the
  whole resized to a square of `side` pixels, of which a random part is taken ('random').

  Every second one is flipped left-right, if `flip`; then come so many `operations` of RandAugment.
  """
  choose = (
    (lambda h, w: sample_crop_box(h, w, key=key, area=area, aspect=aspect))
    if crop == 'inception'
    else None
  )
  image = decode_image(data, name=name, max_pixels=max_pixels, box=choose)
  image = (
    random_crop(resize_bilinear(image, (side, side)), out.shape[:2], key=key)
    if crop == 'random'
    else image
  )
  if flip and random_bits(key, 0)[-1] >> 63:
    cv2.flip(resize_bilinear(image, out.shape[:2]), 1, dst=out)
  else:
    resize_bilinear(image, out.shape[:2], out)
  if operations:
    out[...] = rand_augment(
      out, random_bits(key, MAX_CROP_ATTEMPTS), count=operations, magnitude=magnitude
    )


def write_eval_image(
  data: ImageData, out: np.ndarray, *, name: str, crop: str, short_side: int, max_pixels: int
):
  """Writes an evaluation image into `out` [h, w, 3], rounded where `out` is uint8, exact where it is float32.

  The whole image resized ('resize'), or the middle of the image with its short side resized to `short_side` ('center').
  """
  image = decode_image(data, name=name, max_pixels=max_pixels).astype(out.dtype, copy=False)
  if crop == 'center':
    scale = short_side / min(image.shape[:2])
    image = resize_bilinear(
      image, tuple(max(short_side, round(n * scale)) for n in image.shape[:2])
    )
    y, x = ((n - m) // 2 for n, m in zip(image.shape[:2], out.shape[:2], strict=True))
    out[...] = image[y : y + out.shape[0], x : x + out.shape[1]]
  else:
    resize_bilinear(image, out.shape[:2], out)


def resize_bilinear(
  image: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
  """Bilinear, half-pixel centres, no antialiasing: tf.image.resize to 0.01 of 255 on float32, to one level on uint8."""
  if image.shape[:2] == size and out is not None:
    np.copyto(out, image)
    return out
  return cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)


def random_bits(key: ImageKey, block: int) -> tuple[int, ...]:
  """Eight uniform 64-bit integers: block number `block` of the stream of `key`. A hash, so any block costs the same."""
  return struct.unpack('<8Q', hashlib.blake2b(struct.pack('<4Q', *key, block)).digest())


def sample_crop_box(
  height: int, width: int, *, key: ImageKey, area: tuple[float, float], aspect: tuple[float, float]
) -> CropBox:
  """TensorFlow's rule (sample_distorted_bounding_box without objects): an aspect, then a height where the area fits.

  `area` is the box's share of the image, `aspect` its width over its height.
  """
  for attempt in range(MAX_CROP_ATTEMPTS):
    for_aspect, for_height, for_y, for_x = random_bits(key, attempt)[:4]
    ratio = aspect[0] + (for_aspect >> 11) * 2**-53 * (aspect[1] - aspect[0])
    h, w = _sample_box_size(
      height, width, ratio, [share * height * width for share in area], for_height
    )
    if h and w:
      return _scale_bits(for_y, height - h), _scale_bits(for_x, width - w), h, w
  return 0, 0, height, width


def random_crop(image: np.ndarray, size: tuple[int, int], *, key: ImageKey) -> np.ndarray:
  """A part of that size, each place as likely as any other."""
  bits = random_bits(key, 0)
  y, x = (_scale_bits(bits[i], image.shape[i] - size[i] + 1) for i in range(2))
  return image[y : y + size[0], x : x + size[1]]


def _sample_box_size(
  height: int, width: int, ratio: float, area: list[float], bits: int
) -> tuple[int, int]:
  """Of a box with width / height = ratio and an area in [low, high] pixels; 0, 0 where rounding prevents it."""
  low, high = area
  h = round(math.sqrt(low / ratio))
  most = round(math.sqrt(high / ratio))
  if round(most * ratio) > width:
    most = int((width + 0.5 - 1e-7) / ratio)
    most -= round(most * ratio) > width
  most = min(most, height)
  h = most if h >= most else h + _scale_bits(bits, most - h + 1)
  h += h * round(h * ratio) < low
  h -= h * round(h * ratio) > high
  w = round(h * ratio)
  fits = low <= h * w <= high and 0 < w <= width and 0 < h <= height
  return (h, w) if fits else (0, 0)


def _scale_bits(bits: int, n: int) -> int:
  """64 uniform bits as a uniform integer in [0, n); 0 for n = 0."""
  return bits * n >> 64


def _crop_to_box(image: np.ndarray, box: ChooseBox | None) -> np.ndarray:
  if box is None:
    return image
  y, x, h, w = box(*image.shape[:2])
  return image[y : y + h, x : x + w]


def _decode_array(pixels: np.ndarray) -> np.ndarray:
  channels = pixels.shape[2:]
  if (
    pixels.dtype != np.uint8
    or pixels.ndim < 2
    or channels not in ((), (1,), (3,))
    or not pixels.size
  ):
    raise ValueError(
      f'expected uint8 pixels [h, w], [h, w, 1] or [h, w, 3], got {pixels.dtype} {list(pixels.shape)}'
    )
  return pixels if channels == (3,) else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def _decode_jpeg(data: bytes, max_pixels: int, box: ChooseBox | None) -> np.ndarray:
  """Rows below the box are never decoded: the header is told that the image ends there, and so is the decoder."""
  header = _read_jpeg_header(data)
  _check_pixel_count(header.height, header.width, max_pixels)
  y, x, h, w = box(header.height, header.width) if box else (0, 0, header.height, header.width)
  rows, at = header.height, header.height_at
  if (
    header.strip
  ):  # One more than the box is in, since chroma is interpolated with the row that follows.
    rows = min(rows, (-(-(y + h) // header.strip) + 1) * header.strip)
    data = b''.join((data[:at], rows.to_bytes(2), data[at + 2 :]))
  image = np.empty((rows, header.width, 3), np.uint8)
  try:
    simplejpeg.decode_jpeg(
      data, 'RGB', fastdct=True, buffer=image
    )  # TensorFlow's default, to the bit.
  except ValueError as error:
    # After the last row the decoder looks for the end of the file, and finds rows it was not told of. A file that was
    # cut short, or is broken above that place, has another message: of several problems the first is told.
    if 'extraneous bytes before marker 0xd9' not in str(error):
      raise
  return image[y : y + h, x : x + w]


def _read_jpeg_header(data: bytes) -> JpegHeader:
  """Reads the segments up to the first scan."""
  at, frame, restarts = 2, 0, False
  while data[at + 1] != 0xDA:
    marker = data[at + 1]
    if data[at] != 0xFF:
      raise ValueError('it is a broken JPEG: a marker is missing')
    if marker == 0xFF:  # Padding.
      at += 1
      continue
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      frame = at
    restarts |= marker == 0xDD
    at += 2 + int.from_bytes(data[at + 2 : at + 4])
  height, width, components = struct.unpack_from('>HHB', data, frame + 5)
  one_pass = data[frame + 1] in (0xC0, 0xC1) and data[at + 4] == components and not restarts
  strip = 8 * max(data[i] & 15 for i in range(frame + 11, frame + 11 + 3 * components, 3))
  return JpegHeader(height, width, frame + 5, strip if one_pass else 0)


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
  """Opening reads the headers only, so the size is checked before pixels are allocated. The first frame of several."""
  Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which is another.
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
  """Compares the checksums of the chunks that make the image: Pillow passes over those of the pixels."""
  at, kind = 8, b''
  while kind != b'IEND':
    length, kind = struct.unpack_from('>I4s', data, at)
    (checksum,) = struct.unpack_from('>I', data, at + 8 + length)
    if kind[:1].isupper() and zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != checksum:
      raise ValueError(
        f'it is a broken PNG: the checksum of its {kind.decode(errors="replace")} is another'
      )
    at += 12 + length


def _convert_16_bit(image: np.ndarray) -> np.ndarray:
  """OpenCV's 16 bits a channel -> RGB, rounded to the nearest of 8 bits. Pillow drops the low byte, or clips."""
  image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
  image = cv2.cvtColor(image, TO_RGB_CODES[image.shape[2:]])
  return image if image.shape[2] == 3 else _composite_on_white(image)


def _composite_on_white(image: np.ndarray) -> np.ndarray:
  """RGBA -> RGB as on a white page: under transparent pixels lies whatever a program left there, often black."""
  color, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _check_pixel_count(height: int, width: int, max_pixels: int):
  if not height or not width:
    raise ValueError('the header says that it has no pixels')
  if height * width > max_pixels:
    raise ValueError(f'{height} x {width} pixels are more than config.data.max_pixels={max_pixels}')


def _describe_decode_error(data: bytes | np.ndarray, error: Exception) -> str:
  """One line."""
  if not isinstance(data, np.ndarray) and not data:
    return 'the file is empty'
  if isinstance(error, (IndexError, struct.error)):
    return 'the file is cut short'
  text = ' '.join(str(error).split()) or type(error).__name__
  return 'it is no image of a known format' if 'cannot identify image file' in text else text
