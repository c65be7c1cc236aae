"""Decoding single images."""

import io
import pickle
import tracemalloc

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.data.photo import file, photo
from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.errors import UserError

PIXELS = 10**8


def read(data, **kwargs) -> np.ndarray:
  return decode_image(data, **{'name': 'a.jpg', 'max_pixels': PIXELS} | kwargs)


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'GIF', 'WEBP', 'TIFF', 'PPM'])
def test_lossless_files_are_read_exactly(kind):
  image = photo()
  if kind == 'GIF':
    image = image // 64 * 64  # 64 colors fit into a palette.
  assert np.array_equal(
    read(file(image, kind, **{'lossless': True} if kind == 'WEBP' else {})), image
  )


@pytest.mark.parametrize(
  'options', [{'subsampling': n} for n in (0, 1, 2)] + [{'progressive': True}], ids=str
)
def test_a_jpeg_equals_pillows_up_to_the_fast_dct(options):
  data = file(photo(), 'JPEG', quality=92, **options)
  ours, theirs = read(data).astype(int), np.asarray(Image.open(io.BytesIO(data))).astype(int)
  assert np.abs(ours - theirs).max() <= 12
  assert np.abs(ours - theirs).mean() < 1.5
  accurate = read(data, fast_dct=False).astype(int)
  assert np.abs(accurate - theirs).max() <= 4  # Two versions of libjpeg-turbo, by one rounding.


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP'])
def test_gray_becomes_three_equal_channels(kind):
  image = read(file(Image.fromarray(photo()[..., 2]), kind, quality=95))
  assert image.shape == (83, 117, 3)
  assert np.ptp(image, axis=2).max() <= (2 if kind == 'WEBP' else 0)
  assert np.abs(image[..., 0].astype(int) - photo()[..., 2]).mean() < 2


@pytest.mark.parametrize('shape', [(83, 117), (83, 117, 1)])
def test_pixels_are_unchanged_and_gray_becomes_rgb(shape):
  gray = photo()[..., 0].reshape(shape)
  assert np.array_equal(read(gray), np.repeat(gray.reshape(83, 117, 1), 3, 2))
  assert np.array_equal(read(photo()), photo())


def test_black_and_white_and_palettes_become_rgb():
  bits = Image.fromarray(photo()[..., 0]).convert('1')
  assert np.array_equal(read(file(bits, 'PNG'))[..., 1], np.asarray(bits) * np.uint8(255))
  palette = Image.fromarray(photo()).quantize(100)
  assert np.array_equal(read(file(palette, 'PNG')), np.asarray(palette.convert('RGB')))


def test_transparency_is_composited_on_white():
  alpha = np.linspace(0, 255, 117).astype(np.uint8)[None, :, None].repeat(83, 0)
  expected = np.rint(photo() * (alpha / 255) + 255 * (1 - alpha / 255))
  for kind, options in (('PNG', {}), ('WEBP', {'lossless': True, 'exact': True})):
    got = read(file(np.concatenate([photo(), alpha], 2), kind, **options))
    assert np.abs(got - expected).max() <= 1
  gray = read(file(Image.fromarray(np.concatenate([photo()[..., :1], alpha], 2), 'LA'), 'PNG'))
  assert np.abs(gray[..., 0] - expected[..., 0]).max() <= 1


def test_a_transparent_palette_entry_is_white():
  image = Image.fromarray((np.arange(12, dtype=np.uint8).reshape(3, 4) % 3), 'P')
  image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
  for kind in ('PNG', 'GIF'):
    got = read(file(image, kind, transparency=2))
    assert got.reshape(-1, 3)[:3].tolist() == [[10, 20, 30], [40, 50, 60], [255, 255, 255]]


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_sixteen_bits_are_rounded_to_eight(channels):
  deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
  if channels == 4:
    deep[..., 3] = 65535
  got = read(cv2.imencode('.png', deep)[1].tobytes())
  expected = np.rint(deep[..., :3][..., ::-1] / 257).astype(np.uint8)
  assert np.array_equal(got, np.broadcast_to(expected, got.shape))
  if channels == 1:
    assert np.array_equal(read(file(Image.fromarray(deep[..., 0]), 'TIFF')), got)


def test_cmyk_and_ycck_jpegs_become_rgb():
  cmyk = np.asarray(Image.fromarray(photo()).convert('CMYK'))
  plain = file(Image.fromarray(cmyk, 'CMYK'), 'JPEG', quality=98)
  inverted = np.ascontiguousarray(255 - cmyk)  # As Adobe writes CMYK.
  ycck = simplejpeg.encode_jpeg(inverted, 98, 'CMYK', '444')
  for data in (plain, ycck):
    assert np.abs(read(data).astype(int) - photo()).mean() < 3
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)
    assert np.abs(read(data) - theirs).mean() < 3


def test_the_first_frame_of_an_animation_is_decoded():
  frames = [Image.fromarray(photo() // 64 * 64), Image.fromarray(255 - photo() // 64 * 64)]
  for kind in ('GIF', 'WEBP', 'PNG'):
    options = {'lossless': True} if kind == 'WEBP' else {}
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read(data), np.asarray(frames[0]))


JPEG, PNG = file(photo(), 'JPEG', quality=92), file(photo(), 'PNG')


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'empty'),
    (b'<!DOCTYPE html><html>404</html>', 'format is unknown'),
    (JPEG[: len(JPEG) // 2], 'remature end'),
    (JPEG[:-2], 'remature end'),
    (JPEG[:30], 'truncated'),
    (PNG[: len(PNG) // 2], 'jpg: .'),
    (PNG[:20], 'jpg: .'),
    (file(photo(), 'GIF')[:900], 'jpg: .'),
    (file(photo(), 'WEBP')[:400], 'jpg: .'),
    (file(photo(), 'BMP')[:900], 'jpg: .'),
    (np.zeros((4, 4), np.float32), 'float32'),
    (np.zeros((4, 4, 2), np.uint8), r'\[4, 4, 2\]'),
    (np.zeros((0, 4, 3), np.uint8), r'\[0, 4, 3\]'),
  ],
)
def test_an_undecodable_image_is_a_one_line_error(data, reason):
  with pytest.raises(BadImageError, match=reason) as error:
    read(data, name='train/rose/1.jpg')
  text = str(error.value)
  assert isinstance(error.value, UserError)
  assert text.startswith('train/rose/1.jpg: ')
  assert text.endswith('--config.data.bad_images=skip')
  assert '\n' not in text
  assert str(pickle.loads(pickle.dumps(error.value))) == text


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'BMP', 'WEBP'])
def test_a_decompression_bomb_is_refused_by_its_header(kind):
  data = bytearray(file(photo(), kind))
  if kind == 'JPEG':
    at = data.index(b'\xff\xc0') + 5
    data[at : at + 4] = b'\xff\xff\xff\xff'
  limit = 83 * 117 - 1 if kind != 'JPEG' else 2**32 - 2**17
  with pytest.raises(BadImageError, match=f'config.data.max_pixels={limit}'):
    read(bytes(data), max_pixels=limit)


@pytest.mark.parametrize('subsampling', ['444', '422', '420', '440', '411', 'Gray'])
def test_a_decoded_box_equals_the_box_of_the_decoded_image(subsampling):
  source = photo(150, 131)
  gray = subsampling == 'Gray'
  pixels = np.ascontiguousarray(source[..., :1]) if gray else source
  data = simplejpeg.encode_jpeg(pixels, 90, 'GRAY' if gray else 'RGB', subsampling)
  full = read(data)
  for y, h in [(0, 1), (0, 15), (3, 13), (7, 40), (31, 1), (60, 60), (100, 50)]:
    assert np.array_equal(read(data, box=lambda *_, y=y, h=h: (y, 5, h, 77)), full[y : y + h, 5:82])


@pytest.mark.parametrize('options', [{'progressive': True}, {'restart_marker_rows': 1}], ids=str)
def test_a_box_of_a_jpeg_that_is_decoded_to_the_end(options):
  data = file(photo(150, 131), 'JPEG', **options)
  assert np.array_equal(read(data, box=lambda *_: (3, 5, 20, 30)), read(data)[3:23, 5:35])


def test_a_jpeg_truncated_below_the_box_is_bad():
  data = file(photo(300, 300), 'JPEG', quality=95)
  for length in (len(data) * 3 // 4, len(data) - 2):
    with pytest.raises(BadImageError, match='remature end'):
      read(data[:length], box=lambda *_: (0, 0, 20, 20))


def test_a_jpeg_truncated_anywhere_is_bad():
  for percent in range(100):
    with pytest.raises(BadImageError):
      read(JPEG[: len(JPEG) * percent // 100])


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'])
def test_a_flipped_bit_gives_an_image_or_a_bad_image_deterministically(kind):
  data, rng, bad, other = file(photo(), kind), np.random.default_rng(0), 0, 0
  for at, bit in zip(rng.integers(0, len(data), 100), rng.integers(0, 8, 100), strict=True):
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    results = [outcome(bytes(flipped)) for _ in range(2)]
    assert results[0] == results[1]
    bad += results[0] is None
    other += results[0] not in (None, outcome(data))
  assert bad > 3 or kind == 'BMP'  # BMP has hardly any structure besides pixels.
  assert not other or kind != 'PNG'  # Only PNG has checksums.


def outcome(data: bytes) -> bytes | None:
  """Return the pixels, or None for a bad image."""
  try:
    image = read(data, max_pixels=10**6)
  except BadImageError:
    return None
  assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
  return image.tobytes()


def test_a_decompression_bomb_is_refused_before_its_memory_is_allocated():
  """The file has 6,000 x 6,000 pixels in 35 kB, one row more than allowed."""
  bomb = file(Image.new('1', (6_000, 6_000)), 'PNG')
  tracemalloc.start()
  with pytest.raises(BadImageError, match='6000 x 6000 .*config.data.max_pixels=35994000'):
    read(bomb, max_pixels=5_999 * 6_000)
  assert tracemalloc.get_traced_memory()[1] < 10e6
  tracemalloc.stop()


def test_an_image_of_one_pixel_is_decoded():
  for kind in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'):
    assert read(file(photo(1, 1), kind)).shape == (1, 1, 3)


def test_extra_bytes_before_the_end_of_a_jpeg_are_ignored():
  assert np.array_equal(read(JPEG[:-2] + b'\0\1\2' + JPEG[-2:]), read(JPEG))


@pytest.mark.parametrize('subsampling', ['444', '422', '420', '440', '411'])
def test_a_decoded_box_equals_tensorflows(subsampling):
  tf = pytest.importorskip('tensorflow')
  data = simplejpeg.encode_jpeg(photo(150, 131), 90, 'RGB', subsampling)
  # decode_and_crop_jpeg lacks the chroma beyond the box.
  theirs = tf.io.decode_jpeg(data, channels=3).numpy()
  assert np.array_equal(read(data, box=lambda *_: (40, 10, 50, 60)), theirs[40:90, 10:70])
