"""The formulas of big_vision's RandAugment, in NumPy, written from its TensorFlow code.

TensorFlow and TensorFlow Addons are not needed. Sums and blends are float64. Coordinates are
float32, because halves are rounded: TensorFlow's own compiler may still round a few otherwise.

Each function maps (image uint8 [h, w, 3], level, sign) to an image. `level` is the magnitude / 10.
"""

import numpy as np


def cast(x: np.ndarray) -> np.ndarray:
  """Clip, and cut to an integer as `tf.cast` does."""
  return np.floor(np.clip(x, 0, 255)).astype(np.uint8)


def blend(first, second, factor: float) -> np.ndarray:
  first, second = np.float64(first), np.float64(second)
  return cast(first + factor * (second - first))


def enhance(level: float) -> float:
  return level * 1.8 + 0.1


def gray(image) -> np.ndarray:
  """tf.image.rgb_to_grayscale: to [0, 1] and back with a factor of 255.5."""
  weighted = (image / 255.0 * np.array([0.2989, 0.587, 0.114])).sum(axis=-1, keepdims=True)
  return cast(np.repeat(weighted * 255.5, 3, axis=-1))


def color(image, level, sign):
  return blend(gray(image), image, enhance(level))


def contrast(image, level, sign):
  counts, _ = np.histogram(gray(image)[..., 0], bins=256, range=(0, 255))
  mean = cast(np.float64(counts.sum() / 256))  # Not weighted by the values.
  return blend(np.full_like(image, mean), image, enhance(level))


def brightness(image, level, sign):
  return blend(np.zeros_like(image), image, enhance(level))


def sharpness(image, level, sign):
  h, w, _ = image.shape
  weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])
  total = sum(
    weights[i, j] * image[i : h - 2 + i, j : w - 2 + j].astype(int)
    for i in range(3)
    for j in range(3)
  )
  smooth = image.copy()
  smooth[1:-1, 1:-1] = total // 13
  return blend(smooth, image, enhance(level))


def autocontrast(image, level, sign):
  out = image.copy()
  for i in range(3):
    low, high = np.float32(image[..., i].min()), np.float32(image[..., i].max())
    if high > low:
      scale = np.float32(255) / (high - low)
      out[..., i] = cast(image[..., i].astype(np.float32) * scale + -low * scale)
  return out


def equalize(image, level, sign):
  out = image.copy()
  for i in range(3):
    counts = np.histogram(image[..., i], bins=np.arange(257))[0]
    step = (counts.sum() - counts[counts != 0][-1]) // 255
    if step:
      table = (np.cumsum(counts) + step // 2) // step
      out[..., i] = np.clip(np.concatenate([[0], table[:-1]]), 0, 255)[image[..., i]]
  return out


def invert(image, level, sign):
  return 255 - image


def posterize(image, level, sign):
  """TensorFlow shifts by an uint8, and by 7 bits at most."""
  divisor = 2 ** min(7, (8 - int(level * 4)) % 256)
  return (image.astype(int) // divisor * divisor).astype(np.uint8)


def solarize(image, level, sign):
  """The threshold is an uint8."""
  values = image.astype(int)
  return np.where(values < int(level * 256) % 256, values, 255 - values).astype(np.uint8)


def solarize_add(image, level, sign):
  values = image.astype(int)
  added = np.clip(values + int(level * 110), 0, 255)
  return np.where(values < 128, added, values).astype(np.uint8)


def transform(image, a, b, c, d, e, f):
  """The kernel of tfa.image.transform with a gray background, pixel by pixel of the output."""
  h, w, _ = image.shape
  a, b, c, d, e, f = (np.float32(x) for x in (a, b, c, d, e, f))
  y, x = np.meshgrid(np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32), indexing='ij')

  def half_away_from_zero(v):
    v = v.astype(np.float64)
    return (np.sign(v) * np.floor(np.abs(v) + 0.5)).astype(int)

  column = half_away_from_zero(a * x + b * y + c)
  row = half_away_from_zero(d * x + e * y + f)
  inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
  out = np.full_like(image, 128)
  out[inside] = image[row[inside], column[inside]]
  return out


def rotate(image, level, sign):
  angle = np.float32(sign * level * 30) * np.float32(np.pi / 180)
  cos, sin = np.cos(angle), np.sin(angle)
  h, w = np.float32(image.shape[0] - 1), np.float32(image.shape[1] - 1)
  x = (w - (cos * w - sin * h)) / np.float32(2)
  y = (h - (sin * w + cos * h)) / np.float32(2)
  return transform(image, cos, -sin, x, sin, cos, y)


REFERENCE = {
  'AutoContrast': autocontrast,
  'Equalize': equalize,
  'Invert': invert,
  'Rotate': rotate,
  'Posterize': posterize,
  'Solarize': solarize,
  'Color': color,
  'Contrast': contrast,
  'Brightness': brightness,
  'Sharpness': sharpness,
  'ShearX': lambda i, level, sign: transform(i, 1, sign * level * 0.3, 0, 0, 1, 0),
  'ShearY': lambda i, level, sign: transform(i, 1, 0, 0, sign * level * 0.3, 1, 0),
  'TranslateX': lambda i, level, sign: transform(i, 1, 0, sign * level * 100, 0, 1, 0),
  'TranslateY': lambda i, level, sign: transform(i, 1, 0, 0, 0, 1, sign * level * 100),
  'SolarizeAdd': solarize_add,
}


def cutout(image, level, y, x):
  """Gray the square of 2 * int(40 * level) pixels around (y, x)."""
  half, (h, w, _) = int(level * 40), image.shape
  row, column = np.arange(h)[:, None] - y, np.arange(w) - x
  covered = (row >= -half) & (row < half) & (column >= -half) & (column < half)
  return np.where(covered[..., None], 128, image)
