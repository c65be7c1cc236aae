"""Pillow's own test images: equal to Pillow's pixels, or refused by name.

Set VIT_JAX_PILLOW_IMAGES to the folder Tests/images of Pillow's source distribution.
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import IMAGE_FORMATS, BadImageError, decode_image

ROOT = Path(os.environ.get('VIT_JAX_PILLOW_IMAGES', '/missing'))
MAX_PIXELS = 10**8
# Its coded pixels are corrupt: Pillow shows stripes of noise.
REFUSED = {'hopper_bad_exif.jpg'}


def by_pillow(data: bytes) -> np.ndarray | None:
  """Return Pillow's pixels on white, 16 bits rounded; None if it does not read the file."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.format not in (*IMAGE_FORMATS, 'MPO') or image.width * image.height > MAX_PIXELS:
        return None
      image.load()
  except Exception:
    return None
  pixels = np.asarray(image)
  if image.mode.startswith('I;16') or (image.format == 'PPM' and image.mode == 'I'):
    bits = image.tag_v2.get(258, (16,))[0] if image.format == 'TIFF' else 16
    gray = np.rint(pixels / (2**bits - 1) * 255)
    gray[pixels == image.info.get('transparency', -1)] = 255
    return np.repeat(gray[..., None], 3, axis=2)
  if not image.has_transparency_data:
    return np.asarray(image.convert('RGB')).astype(float)
  rgba = np.asarray(image.convert('RGBA')).astype(float)
  alpha = rgba[..., 3:] / 255
  return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.skipif(not ROOT.is_dir(), reason='needs VIT_JAX_PILLOW_IMAGES')
@pytest.mark.filterwarnings('ignore')
def test_pillows_test_images_have_pillows_pixels_or_are_refused_by_name():
  differ, refused, compared = {}, {}, 0
  files = sorted(path for path in ROOT.rglob('*') if path.is_file())
  for path in files:
    data = path.read_bytes()
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      theirs = by_pillow(data)
    if theirs is None:
      continue
    try:
      ours = decode_image(data, name=path.name, max_pixels=MAX_PIXELS, fast_dct=False)
    except BadImageError as error:
      refused[path.name] = str(error)
      continue
    compared += 1
    if ours.shape != theirs.shape or np.abs(ours - theirs).mean() > 2:
      differ[path.name] = (ours.shape, theirs.shape)
  assert not differ
  assert refused.keys() <= REFUSED, refused
  assert compared > 600
