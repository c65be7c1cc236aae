"""Make large images of packed data smaller (pack.py), as JPEG."""

import numpy as np
import simplejpeg

from vit_jax.config import DataConfig
from vit_jax.data.decode import BadImageError, ImageData, decode_image
from vit_jax.data.preprocessing import decoding_options
from vit_jax.data.resize import resize_image
from vit_jax.errors import UserError

REENCODE_FILTER = 'pil_bicubic'  # With antialiasing.
MAX_JPEG_SIDE = 65_535  # Of the format.
REENCODE_SUBSAMPLING = '420'  # Of the chroma, as in most JPEG files.


def reencode_image(
  data: ImageData, name: str, short_side: int, quality: int, *, user_file: bool
) -> ImageData:
  """Return a JPEG of an image whose short side is reduced to `short_side` pixels.

  Smaller images, those whose long side would be too long for a JPEG, and those that cannot be
  decoded, stay as they are. The JPEG is upright if the orientation counts by default (`user_file`).
  It has no metadata.

  Raises UserError if the image is not a file.
  """
  if isinstance(data, np.ndarray):
    raise UserError(f'{name} is not an image file; it cannot be packed with --reencode')
  options = decoding_options('auto', 'auto', user_file=user_file)
  try:
    image = decode_image(data, name=name, max_pixels=DataConfig().max_pixels, **options)
  except BadImageError:
    return data
  h, w = image.shape[:2]
  if min(h, w) <= short_side:
    return data
  size = tuple(round(n * short_side / min(h, w)) for n in (h, w))
  if max(size) > MAX_JPEG_SIDE:
    return data
  return simplejpeg.encode_jpeg(
    resize_image(image, size, REENCODE_FILTER),
    quality=quality,
    colorspace='RGB',
    colorsubsampling=REENCODE_SUBSAMPLING,
  )


def describe_reencoding(reencode: tuple[int, int] | None) -> dict[str, object] | None:
  """Return the entry of the manifest for (short side, quality), or None."""
  if not reencode:
    return None
  return {
    'short_side': reencode[0],
    'quality': reencode[1],
    'interpolation': REENCODE_FILTER,
    'subsampling': REENCODE_SUBSAMPLING,
  }
