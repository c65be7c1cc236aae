"""Decode an image file, or pixels, to uint8 [h, w, 3] RGB."""

import functools
import importlib.util
import io
import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from vit_jax.data.jpeg_header import may_have_orientation, read_jpeg_header, repair_jpeg_header
from vit_jax.data.png_chunks import find_png_chunk, select_png_chunks
from vit_jax.errors import UserError, one_line

CropBox = tuple[int, int, int, int]  # (y, x, h, w) in pixels.
ChooseBox = Callable[[int, int], CropBox]  # (height, width) of an image -> box.
ImageData = bytes | np.ndarray

# The formats that are read, as Pillow names them. Without a list Pillow tries all that it knows,
# and hands PostScript to Ghostscript. HEIF needs pillow-heif.
IMAGE_FORMATS = (
  'JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'DIB', 'TIFF', 'AVIF', 'JPEG2000', 'PPM', 'HEIF',
)  # fmt: skip
HEIF_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
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
_BITS_PER_SAMPLE = 258  # The tag of a TIFF file.
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
    if data[:2] == b'\xff\xd8':
      orientation = _read_jpeg_orientation(data) if orient else 1
      if orientation == 1:
        return _decode_jpeg(data, max_pixels, box, fast_dct)
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
  try:
    if not may_have_orientation(data):
      return 1
    with _open_image(data, ('JPEG',)) as image:
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
  if box is None:
    return None
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
  """Decode a JPEG, whose header may be irregular, down to the last row of the box."""
  try:
    return _decode_regular_jpeg(data, max_pixels, box, fast_dct)
  except ValueError:
    repaired = repair_jpeg_header(data)
    if repaired == data:
      raise
  return _decode_regular_jpeg(repaired, max_pixels, box, fast_dct)


def _decode_regular_jpeg(
  data: bytes, max_pixels: int, box: ChooseBox | None, fast_dct: bool
) -> np.ndarray:
  """Decode a JPEG. Raises ValueError for anything that libjpeg reports.

  The height in the header is replaced by the last row needed, so the decoder stops there.
  """
  header = read_jpeg_header(data)
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


@functools.cache
def _installed_formats() -> tuple[str, ...]:
  """Return the members of IMAGE_FORMATS that this installation of Pillow can open."""
  if importlib.util.find_spec('pillow_heif') is not None:
    import pillow_heif

    pillow_heif.register_heif_opener()
  Image.init()
  return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _open_image(data: bytes, formats: tuple[str, ...]) -> Image.Image:
  """Open a file as one of the formats, without decoding its pixels."""
  Image.MAX_IMAGE_PIXELS = None  # Ours is config.data.max_pixels; Pillow's limit differs.
  return Image.open(io.BytesIO(data), formats=formats)


def _decode_with_pillow(data: bytes, max_pixels: int, orient: bool) -> np.ndarray:
  """Decode the first frame of a file in any format that Pillow reads."""
  if data[:4] == b'\x89PNG':
    data = select_png_chunks(data)
  # Opening reads only the headers, so the size is checked before pixels are allocated.
  with _open_image(data, _installed_formats()) as image:
    _check_pixel_count(image.height, image.width, max_pixels)
    image.load()
    orientation = _read_orientation(image) if orient else 1
    return _turn_upright(_convert_to_rgb(image, data), orientation)


def _convert_to_rgb(image: Image.Image, data: bytes) -> np.ndarray:
  """Convert a loaded image to RGB on white. `data` is its file."""
  if image.format == 'PNG' and image.mode in ('1', 'L', 'I;16'):
    return _convert_gray_png(image, data)
  if image.format == 'PNG' and data[24] == 16:  # Pillow drops the low byte.
    return _convert_16_bit(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
  if image.mode.startswith('I;16'):
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if image.format == 'TIFF' else 16
    return _convert_16_bit(np.asarray(image), maximum=2 ** min(bits, 16) - 1)
  if image.format == 'PPM' and image.mode == 'I':
    return _convert_16_bit(np.asarray(image))
  if image.has_transparency_data:
    return _composite_on_white(np.asarray(image.convert('RGBA')))
  return np.asarray(image.convert('RGB'))


def _convert_gray_png(image: Image.Image, data: bytes) -> np.ndarray:
  """Convert a loaded gray PNG of 1 to 16 bits to RGB, with its transparent gray level as white.

  Pillow compares pixels of 2 and 4 bits, which it has scaled to 8, with the unscaled level.
  """
  bits, level = data[24], find_png_chunk(data, b'tRNS')
  pixels = np.asarray(image if image.mode == 'I;16' else image.convert('L'))
  rgb = _convert_16_bit(pixels) if bits == 16 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
  if level is not None and len(level) >= 2:
    scale = 1 if bits == 16 else 255 // (2**bits - 1)
    rgb[pixels == int.from_bytes(level[:2]) % 2**bits * scale] = 255
  return rgb


def _convert_16_bit(image: np.ndarray, maximum: int = 65535) -> np.ndarray:
  """Convert an OpenCV image of up to 16 bits per channel to 8-bit RGB, rounding to nearest.

  Pillow drops the low byte, or clips.
  """
  image = ((image.astype(np.uint32) * 255 + maximum // 2) // maximum).astype(np.uint8)
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
  return _describe_format(data) if 'cannot identify image file' in text else text


def _describe_format(data: bytes) -> str:
  """Say what a file is that no decoder reads."""
  if data[4:8] == b'ftyp' and data[8:12] in HEIF_BRANDS:
    if 'HEIF' in _installed_formats():
      return 'the HEIF image is damaged'
    return "HEIF images need pillow-heif: pip install 'vit-jax[heic]'"
  for name, (_, accept) in Image.OPEN.items():
    if accept and accept(data[:16]) is True:
      if name in IMAGE_FORMATS:
        return f'the {name} image is damaged'
      return f'{name} files are not read; convert the image to PNG or JPEG'
  return 'the image format is unknown'
