"""Interpolations, compared with Pillow, with sums by hand, and for regions with full images."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import resize
from vit_jax.data.resize import resize_image, write_resized_region
from vit_jax.settings.limits import CHOICES

INTERPOLATIONS = CHOICES['data.interpolation']


def noise(h: int, w: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)


@pytest.mark.parametrize('name', [name for name in INTERPOLATIONS if name.startswith('pil_')])
def test_pil_interpolations_are_pillows_in_uint8_and_float32(name):
  image, size = noise(60, 90), (25, 40)
  filter = getattr(Image.Resampling, name.removeprefix('pil_').upper())
  expected = np.asarray(Image.fromarray(image).resize((40, 25), filter))
  np.testing.assert_array_equal(resize_image(image, size, name), expected)
  exact = resize_image(image, size, name, np.empty((*size, 3), np.float32))
  np.testing.assert_array_equal(exact, expected)


def area_means(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Return the mean over the area of each output pixel, from cumulative sums."""
  for axis, count in enumerate(size):
    n = image.shape[axis]
    sums = np.concatenate([np.zeros_like(image.take([0], axis)), image], axis).cumsum(axis)
    edges = np.arange(count + 1) * n / count
    moved = np.moveaxis(sums, axis, 0).reshape(n + 1, -1)
    at_edges = np.stack([np.interp(edges, np.arange(n + 1), column) for column in moved.T], -1)
    means = np.diff(at_edges, axis=0) * count / n
    shape = (count, *np.moveaxis(image, axis, 0).shape[1:])
    image = np.moveaxis(means.reshape(shape), 0, axis)
  return image


@pytest.mark.parametrize('size', [(20, 30), (13, 17), (60, 45), (90, 200), (20, 200)])
def test_tf_area_is_the_mean_over_the_area_of_a_pixel_cut_to_an_integer(size):
  image = noise(60, 90)
  means = area_means(image.astype(np.float64), size)
  for dtype in (np.uint8, np.float32):
    got = resize_image(image, size, 'tf_area', np.empty((*size, 3), dtype))
    assert np.abs(got - (means - 0.5)).max() <= 0.51
  assert (resize_image(np.full((60, 90, 3), 128, np.uint8), size, 'tf_area') == 128).all()


@pytest.mark.parametrize('shape', [(33, 50), (50, 33), (10, 78), (2, 300)])
@pytest.mark.parametrize(
  'name', [each for each in INTERPOLATIONS if each not in ('pil_nearest', 'pil_box')]
)
def test_a_region_has_the_pixels_of_the_full_image(monkeypatch, shape, name):
  image, short = noise(*shape), min(shape)
  size = tuple(round(n * 26 / short) for n in shape)
  y, x = (size[0] - 22) // 2, (size[1] - 22) // 2
  full = resize_image(image, size, name)[y : y + 22, x : x + 22]
  monkeypatch.setattr(resize, 'MAX_FULL_RESIZE_PIXELS', 1)
  part = np.empty((22, 22, 3), np.uint8)
  write_resized_region(image, size, (y, x, 22, 22), name, part)
  difference = np.abs(full.astype(int) - part)
  assert difference.max() <= 1
  assert (difference > 0).mean() <= 0.2


@pytest.mark.parametrize('shape', [(33, 50), (100, 77)])
def test_a_large_image_gives_the_same_float32_pixels(monkeypatch, shape):
  image = noise(*shape)
  full = resize_image(image, (22, 30), out=np.empty((22, 30, 3), np.float32))
  monkeypatch.setattr(resize, 'MAX_FULL_RESIZE_PIXELS', 1)
  part = resize_image(image, (22, 30), out=np.empty((22, 30, 3), np.float32))
  assert np.abs(full - part).max() <= 1e-3


MEMORY = """
import resource
import numpy as np
from vit_jax.data.images import write_eval_image
from vit_jax.data.preprocessing import Preprocessing

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
image, before = np.zeros((20000, 2, 3), np.uint8), peak()
for interpolation in ('tf_bilinear', 'tf_area', 'pil_bicubic'):
  for shape in (image, image.transpose(1, 0, 2)):
    for dtype in (np.uint8, np.float32):
      steps = Preprocessing(
        size=(224, 224), crop='center', resize_size=(256, 256), interpolation=interpolation
      )
      out = np.empty((224, 224, 3), dtype)
      write_eval_image(shape, out, name='x', steps=steps, user_file=True, max_pixels=10**8)
print(peak() - before)
"""


def test_the_center_of_a_line_of_20000_pixels_takes_little_memory():
  """The resized image would have 2,560,000 x 256 pixels: 2 GB, and 8 GB in float32."""
  command = [sys.executable, '-c', MEMORY]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert int(out) < 300  # MiB.
