"""Decode an image file, or pixels, to uint8 [h, w, 3] RGB."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from vit_jax.errors import UserError, one_line

CropBox = tuple[int, int, int, int]  # (y, x, h, w) in pixels.
ChooseBox = Callable[[int, int], CropBox]  # (height, width) of an image -> box.
ImageData = bytes | np.ndarray

# EXIF orientation -> (flip the rows, flip the columns, then transpose) of the stored pixels.
UPRIGHT = {
  2: (False, True, False),
  3: (True, True, False),
  4: (True, False, False),
  5: (False, False, True),
  6: (True, False, True),
  7: (True, True, True),
  8: (False, True, True),
}
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
  data: ImageData,
  *,
  name: str,
  max_pixels: int,
  box: ChooseBox | None = None,
  fast_dct: bool = True,
  orient: bool = False,
) -> np.ndarray:
  """Decode an image, or only the box that `box(height, width)` returns.

  Args:
    data: The bytes of an image file, or pixels uint8 [h, w], [h, w, 1] or [h, w, 3].
    name: Identifies the image in error messages.
    max_pixels: Images with more pixels are refused before they are decoded.
    box: Chooses the part of the image to return.
    fast_dct: Decode a JPEG with libjpeg's fast inverse DCT, as TensorFlow does by default. The
      accurate one is Pillow's and OpenCV's.
    orient: Turn the image upright by its EXIF orientation, as Pillow's `ImageOps.exif_transpose`
      does; `box` then refers to the upright image. The pipelines that the released models were
      trained and evaluated with ignore the orientation. TIFF files are always upright.

  Returns:
    uint8 [h, w, 3] RGB.

  Raises BadImageError if the image cannot be decoded.
  """
  try:
    if isinstance(data, np.ndarray):
      return _crop_to_box(_decode_array(data), box)
    if data[:3] == b'\xff\xd8\xff':
      orientation = _read_jpeg_orientation(data) if orient else 1
      image = _decode_jpeg(data, max_pixels, _map_box_to_stored(box, orientation), fast_dct)
      return _turn_upright(image, orientation)
    return _crop_to_box(_decode_with_pillow(data, max_pixels, orient), box)
  except Exception as error:  # Decoders raise ValueError, cv2.error, OSError, SyntaxError, …
    raise BadImageError(name, _describe_decode_error(data, error)) from error


def _crop_to_box(image: np.ndarray, box: ChooseBox | None) -> np.ndarray:
  if box is None:
    return image
  y, x, h, w = box(*image.shape[:2])
  return image[y : y + h, x : x + w]


def _read_orientation(image: Image.Image) -> int:
  """Return the EXIF orientation, or 1 (upright) if it is missing or damaged."""
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # Pillow raises SyntaxError, struct.error, … for damaged metadata.
    return 1
  return orientation if orientation in UPRIGHT else 1


def _read_jpeg_orientation(data: bytes) -> int:
  """Return the orientation in the EXIF or XMP metadata of a JPEG, without decoding it."""
  if b'Exif\0\0' not in data and b'tiff:Orientation' not in data:
    return 1
  try:
    with Image.open(io.BytesIO(data), formats=['JPEG']) as image:
      return _read_orientation(image)
  except Exception:  # The decoder reports what is wrong with the file.
    return 1


def _turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
  """Turn stored pixels [h, w, 3] upright."""
  if orientation == 1:
    return image
  flip_rows, flip_columns, transpose = UPRIGHT[orientation]
  image = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
  return np.ascontiguousarray(image.transpose(1, 0, 2) if transpose else image)


def _map_box_to_stored(box: ChooseBox | None, orientation: int) -> ChooseBox | None:
  """Return a function that chooses the same box, but in the stored pixels of an image."""
  if box is None or orientation == 1:
    return box
  flip_rows, flip_columns, transpose = UPRIGHT[orientation]

  def choose_stored_box(height: int, width: int) -> CropBox:
    y, x, h, w = box(width, height) if transpose else box(height, width)
    if transpose:
      y, x, h, w = x, y, w, h
    return height - y - h if flip_rows else y, width - x - w if flip_columns else x, h, w

  return choose_stored_box


def _decode_array(pixels: np.ndarray) -> np.ndarray:
  channels = pixels.shape[2:]
  valid = pixels.dtype == np.uint8 and pixels.ndim >= 2 and channels in ((), (1,), (3,))
  if not valid or not pixels.size:
    got = f'{pixels.dtype} {list(pixels.shape)}'
    raise ValueError(f'expected uint8 pixels [h, w], [h, w, 1] or [h, w, 3], got {got}')
  return pixels if channels == (3,) else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def _decode_jpeg(data: bytes, max_pixels: int, box: ChooseBox | None, fast_dct: bool) -> np.ndarray:
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
    # With the fast DCT these are TensorFlow's default settings; the result is equal to the bit.
    simplejpeg.decode_jpeg(data, 'RGB', fastdct=fast_dct, buffer=image)
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


def _decode_with_pillow(data: bytes, max_pixels: int, orient: bool) -> np.ndarray:
  """Decode the first frame of a file in any format that Pillow reads."""
  Image.MAX_IMAGE_PIXELS = None  # Ours is config.data.max_pixels; Pillow's limit differs.
  # Opening reads only the headers, so the size is checked before pixels are allocated.
  with Image.open(io.BytesIO(data)) as image:
    _check_pixel_count(image.height, image.width, max_pixels)
    if image.format == 'PNG':
      _check_png_checksums(data)
    image.load()
    orientation = _read_orientation(image) if orient else 1
    return _turn_upright(_convert_to_rgb(image, data), orientation)


def _convert_to_rgb(image: Image.Image, data: bytes) -> np.ndarray:
  """Convert a loaded image to RGB on white. `data` is its file."""
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
