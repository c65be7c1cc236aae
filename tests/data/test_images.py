"""Decoding, cropping, resizing and augmenting single images."""

import io
import pickle
import tracemalloc

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vit_jax.data.images import (
  BadImageError,
  decode_image,
  random_crop,
  resize_bilinear,
  sample_crop_box,
  write_eval_image,
  write_train_image,
)
from vit_jax.data.randaugment import rand_augment
from vit_jax.data.sampler import random_bits
from vit_jax.errors import UserError

AREA, ASPECT, PIXELS = (0.05, 1.0), (3 / 4, 4 / 3), 10**8


def photo(h: int = 83, w: int = 117) -> np.ndarray:
  """Smooth colors with an edge, which JPEG preserves. No two rows or channels are equal."""
  y, x = np.mgrid[:h, :w]
  image = np.stack([255 * y / h, 255 * x / w, 127 + 100 * np.sin(x / 9 + y / 7)], -1)
  image[h // 3 : h // 2, w // 4 :] //= 2
  return image.astype(np.uint8)


def file(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
  out = io.BytesIO()
  (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
  return out.getvalue()


def read(data, **kwargs) -> np.ndarray:
  return decode_image(data, **{'name': 'a.jpg', 'max_pixels': PIXELS} | kwargs)


TRAIN = {
  'name': 'a.jpg', 'key': (0, 0, 0), 'crop': 'inception', 'area': AREA, 'aspect': ASPECT, 'side': 0,
  'flip': True, 'operations': 0, 'magnitude': 0.0, 'max_pixels': PIXELS,
}  # fmt: skip


def train(data, size=(32, 32), **kwargs) -> np.ndarray:
  out = np.empty((*size, 3), np.uint8)
  write_train_image(data, out, **TRAIN | kwargs)
  return out


def evaluate(data, size=(32, 32), dtype=np.uint8, **kwargs) -> np.ndarray:
  out = np.empty((*size, 3), dtype)
  defaults = {'name': 'a.jpg', 'crop': 'resize', 'short_side': 48, 'max_pixels': PIXELS}
  write_eval_image(data, out, **defaults | kwargs)
  return out


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


def test_exif_orientation_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6
  for kind in ('JPEG', 'PNG'):
    assert read(file(photo(), kind, exif=exif)).shape == (83, 117, 3)


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
    assert train(file(photo(1, 1), kind)).shape == (32, 32, 3)


def test_extra_bytes_before_the_end_of_a_jpeg_are_ignored():
  assert np.array_equal(read(JPEG[:-2] + b'\0\1\2' + JPEG[-2:]), read(JPEG))


def test_a_training_image_depends_only_on_its_key():
  keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
  assert all(np.array_equal(train(JPEG, key=key), train(JPEG, key=key)) for key in keys)
  assert len({train(JPEG, key=key).tobytes() for key in keys}) == 4


def test_half_of_the_imagesare_flipped():
  image = photo()
  images = [train(image, (83, 117), crop='resize', key=(7, 0, i)) for i in range(1000)]
  flips, same = (
    sum(np.array_equal(d, expected) for d in images) for expected in (image[:, ::-1], image)
  )
  assert flips + same == 1000
  assert abs(flips - 500) < 64  # Four standard deviations.


def test_the_size_may_be_rectangular():
  assert np.array_equal(
    train(photo(), (20, 50), crop='resize', flip=False), cv2.resize(photo(), (50, 20))
  )
  assert np.array_equal(evaluate(photo(), (20, 50)), cv2.resize(photo(), (50, 20)))


def test_center_crop_resizes_the_short_side_and_crops_the_center():
  image = photo(100, 200)
  small = resize_bilinear(image, (48, 96))
  assert np.array_equal(evaluate(image, (32, 40), crop='center'), small[8:40, 28:68])
  tall = image.transpose(1, 0, 2)
  assert np.array_equal(
    evaluate(tall, (32, 40), crop='center'), resize_bilinear(tall, (96, 48))[32:64, 4:44]
  )


def test_center_crop_rounds_the_long_side_to_the_nearest_pixel():
  image = photo(100, 133)  # 133 * 48 / 100 = 63.84.
  resized = cv2.resize(image, (64, 48), interpolation=cv2.INTER_LINEAR)
  assert np.array_equal(evaluate(image, (32, 40), crop='center'), resized[8:40, 12:52])


def test_randaugment_uses_random_bits_that_the_crop_does_not():
  key = (3, 1, 4)
  expected = rand_augment(train(JPEG, key=key), random_bits(key, 100), count=2, magnitude=9)
  assert np.array_equal(train(JPEG, key=key, operations=2, magnitude=9.0), expected)


def test_a_random_crop_is_flipped_like_any_other_image():
  images = [train(photo(20, 20), (20, 20), crop='random', side=20, key=(0, 0, i)) for i in range(9)]
  flipped = [np.array_equal(image, photo(20, 20)[:, ::-1]) for image in images]
  assert flipped == [bool(random_bits((0, 0, i), 0)[-1] >> 63) for i in range(9)]
  assert 0 < sum(flipped) < 9


def test_float32_is_not_rounded_and_agrees_with_uint8():
  exact = evaluate(photo(), dtype=np.float32)
  assert (exact != np.rint(exact)).any()
  assert np.abs(exact - evaluate(photo())).max() <= 1


def boxes(count: int, h: int = 333, w: int = 500, area=AREA, aspect=ASPECT) -> np.ndarray:
  return np.array(
    [sample_crop_box(h, w, key=(3, 0, i), area=area, aspect=aspect) for i in range(count)]
  )


def test_boxes_are_inside_the_image_and_in_range():
  for h, w, area in [(333, 500, AREA), (500, 200, (0.3, 0.5)), (40, 41, AREA)]:
    y, x, bh, bw = boxes(500, h, w, area).T
    assert (y >= 0).all() and (x >= 0).all() and (y + bh <= h).all() and (x + bw <= w).all()
    fraction = bh * bw / (h * w)
    assert (fraction >= area[0]).all() and (fraction <= area[1]).all()
    assert (np.abs(bw - bh * np.clip(bw / bh, *ASPECT)) <= 0.5 + 1e-9).all()


def test_if_no_box_fits_the_box_is_the_full_image():
  box = sample_crop_box(10, 1000, key=(0, 0, 0), area=(0.9, 1.0), aspect=(1.0, 1.0))
  assert box == (0, 0, 10, 1000)


@pytest.mark.parametrize(('h', 'w'), [(333, 500), (500, 120)])
def test_boxes_have_the_distribution_of_tensorflows(h, w):
  tf = pytest.importorskip('tensorflow')
  stats = pytest.importorskip('scipy.stats')
  theirs = []
  for i in range(2000):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      (h, w, 3), tf.zeros([0, 0, 4]), (i, 5), 0.0, ASPECT, AREA, use_image_if_no_bounding_boxes=True
    )
    theirs.append([*begin.numpy()[:2], *size.numpy()[:2]])
  ours, theirs = boxes(2000, h, w), np.array(theirs)
  for column in range(4):
    assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize('size', [(224, 224), (32, 32), (17, 300)])
def test_resizing_equals_tensorflows(size):
  tf = pytest.importorskip('tensorflow')
  image = np.random.default_rng(0).integers(0, 256, (333, 500, 3), dtype=np.uint8)
  theirs = tf.image.resize(image, size).numpy()
  assert np.abs(evaluate(image, size, np.float32) - theirs).max() <= 0.02
  assert np.abs(evaluate(image, size).astype(float) - np.rint(theirs)).max() <= 1
  trained = train(image, size, crop='resize', flip=False).astype(float)
  assert np.abs(trained - np.rint(theirs)).max() <= 1


@pytest.mark.parametrize('subsampling', ['444', '422', '420', '440', '411'])
def test_a_decoded_box_equals_tensorflows(subsampling):
  tf = pytest.importorskip('tensorflow')
  data = simplejpeg.encode_jpeg(photo(150, 131), 90, 'RGB', subsampling)
  # decode_and_crop_jpeg lacks the chroma beyond the box.
  theirs = tf.io.decode_jpeg(data, channels=3).numpy()
  assert np.array_equal(read(data, box=lambda *_: (40, 10, 50, 60)), theirs[40:90, 10:70])


def test_random_crop_reaches_every_position():
  image = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3)
  parts = {(y, x): image[y : y + 3, x : x + 4] for y in range(3) for x in range(5)}
  crops = [random_crop(image, (3, 4), key=(0, 0, k)) for k in range(200)]
  assert all(any((one == part).all() for one in crops) for part in parts.values())
  out = train(image, size=(3, 3), crop='random', side=3, flip=False)
  np.testing.assert_array_equal(out, resize_bilinear(image, (3, 3)))
