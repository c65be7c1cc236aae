"""A test image and its files."""

import io

import numpy as np
from PIL import Image


def photo(h: int = 83, w: int = 117) -> np.ndarray:
  """Return smooth colors with an edge, which JPEG preserves. All rows and channels differ."""
  y, x = np.mgrid[:h, :w]
  image = np.stack([255 * y / h, 255 * x / w, 127 + 100 * np.sin(x / 9 + y / 7)], -1)
  image[h // 3 : h // 2, w // 4 :] //= 2
  return image.astype(np.uint8)


def file(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
  out = io.BytesIO()
  (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
  return out.getvalue()
