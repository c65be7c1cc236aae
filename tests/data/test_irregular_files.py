"""Files that break the rules of their format at no cost of pixels, and files that lose pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.photo import file, photo
from vit_jax.data.decode import BadImageError, decode_image

JPEG = file(photo(), 'JPEG', quality=92)
OPTIMIZED = file(photo(), 'JPEG', quality=92, optimize=True)
PROGRESSIVE = file(photo(), 'JPEG', quality=92, progressive=True)
PNG = file(photo(), 'PNG')
DEEP = np.linspace(0, 65535, 83 * 117).reshape(83, 117).astype(np.uint16)
ICC = b'\xff\xe2' + struct.pack('>H', 2 + 14 + 5) + b'ICC_PROFILE\0\x09\x02junk!'


def read(data, **kwargs) -> np.ndarray:
  return decode_image(data, **{'name': 'a', 'max_pixels': 10**8} | kwargs)


def by_pillow(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)


def insert(data: bytes, marker: bytes, extra: bytes) -> bytes:
  """Insert bytes before the first segment with a marker."""
  at = data.index(marker)
  return data[:at] + extra + data[at:]


def with_scan(data: bytes, parameters: bytes) -> bytes:
  at = data.index(b'\xff\xda')
  stop = at + 2 + int.from_bytes(data[at + 2 : at + 4])
  return data[: stop - 3] + parameters + data[stop:]


IRREGULAR_JPEGS = {
  'scan header 0,0,0': with_scan(JPEG, b'\0\0\0'),
  'scan header 0,0,0 and stray bytes': insert(with_scan(JPEG, b'\0\0\0'), b'\xff\xdb', b'\x12\x34'),
  'stray bytes before a table': insert(JPEG, b'\xff\xc4', b'\x01\x02\x03\x04'),
  'stray bytes before the frame': insert(JPEG, b'\xff\xc0', b'\0\0'),
  'stray bytes before the scan': insert(JPEG, b'\xff\xda', b'\x07'),
  'stuffed zeros between segments': insert(JPEG, b'\xff\xdb', b'\xff\0\xff\0'),
  'a restart marker between segments': insert(JPEG, b'\xff\xdb', b'\xff\xd0'),
  'padding between segments': insert(JPEG, b'\xff\xdb', b'\xff\xff\xff'),
  'stray bytes after the start': JPEG[:2] + b'\0\0\0' + JPEG[2:],
  'an incomplete color profile': insert(JPEG, b'\xff\xdb', ICC),
  'an unknown JFIF version': JPEG[:11] + b'\x07' + JPEG[12:],
  'a short Adobe segment': insert(JPEG, b'\xff\xdb', b'\xff\xee\0\x07Adobe'),
  'an unknown Adobe transform': insert(
    JPEG, b'\xff\xdb', b'\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09'
  ),
  'an empty application segment': insert(JPEG, b'\xff\xdb', b'\xff\xe5\0\x02'),
  'bytes after the end': JPEG + b'\0' * 100,
  'progressive with stray bytes': insert(PROGRESSIVE, b'\xff\xc2', b'\0\x01'),
}  # fmt: skip


@pytest.mark.parametrize('kind', IRREGULAR_JPEGS)
def test_an_irregular_jpeg_has_the_pixels_that_pillow_reads_from_the_regular_one(kind):
  data = IRREGULAR_JPEGS[kind]
  ours = read(data, fast_dct=False)
  regular = PROGRESSIVE if kind.startswith('progressive') else JPEG
  assert np.abs(ours - by_pillow(regular)).max() <= 4  # Two versions of libjpeg-turbo.
  box = read(data, fast_dct=False, box=lambda *_: (20, 10, 30, 40))
  assert np.array_equal(box, ours[20:50, 10:50])


@pytest.mark.parametrize('kind', IRREGULAR_JPEGS)
def test_damage_is_found_in_an_irregular_jpeg(kind):
  data = IRREGULAR_JPEGS[kind]
  scan = data.index(b'\xff\xda') + 40
  with pytest.raises(BadImageError):
    read(data[: (scan + len(data)) // 2])
  if not kind.startswith(('progressive', 'bytes after')):
    with pytest.raises(BadImageError):
      read(data[:-2])


def test_a_jpeg_whose_pixels_are_damaged_stays_bad():
  scan = JPEG.index(b'\xff\xda') + 14
  middle = (scan + len(JPEG)) // 2
  for damage in (b'\xff\xd9', b'\xff\xd3', b'\xff\xff\xff\xfe'):
    with pytest.raises(BadImageError):
      read(JPEG[:middle] + damage + JPEG[middle + len(damage) :])


@pytest.mark.parametrize(
  'data', [JPEG, OPTIMIZED, PROGRESSIVE], ids=['plain', 'optimized', 'progressive']
)
def test_a_jpeg_that_lacks_a_huffman_table_is_bad(data):
  """libjpeg decodes noise with a standard table instead."""
  at = data.index(b'\xff\xc4')
  for first in (b'\x7f', b'\xef'):  # The marker is damaged, so the table is taken for stray bytes.
    with pytest.raises(BadImageError):
      read(data[:at] + first + data[at + 1 :])


@pytest.mark.parametrize('kind', ['scan header 0,0,0', 'stray bytes before the scan'])
def test_an_irregular_jpeg_is_turned_upright(kind):
  exif = Image.Exif()
  exif[0x0112] = 6
  at = IRREGULAR_JPEGS[kind].index(b'\xff\xdb')
  segment = b'Exif\0\0' + exif.tobytes().removeprefix(b'Exif\0\0')
  segment = b'\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment
  data = IRREGULAR_JPEGS[kind][:at] + segment + IRREGULAR_JPEGS[kind][at:]
  assert np.array_equal(read(data, orient=True), np.rot90(read(JPEG), -1))


def chunk(kind: bytes, contents: bytes, *, wrong_checksum: bool = False) -> bytes:
  checksum = zlib.crc32(kind + contents) ^ wrong_checksum
  return struct.pack('>I', len(contents)) + kind + contents + struct.pack('>I', checksum)


TEXT = chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(3 << 20)))
PROFILE = chunk(b'iCCP', b'icc\0\0' + zlib.compress(bytes(3 << 20)))
AFTER_IHDR = 33
IRREGULAR_PNGS = {
  'no IEND': lambda png: png[:-12],
  'a cut IEND': lambda png: png[:-5],
  'bytes after the end': lambda png: png + b'junk',
  'a text of 3 MB': lambda png: png[:AFTER_IHDR] + TEXT + png[AFTER_IHDR:],
  'a color profile of 3 MB': lambda png: png[:AFTER_IHDR] + PROFILE + png[AFTER_IHDR:],
  'a text with a wrong checksum': lambda png: (
    png[:AFTER_IHDR] + chunk(b'tEXt', b'a\0b', wrong_checksum=True) + png[AFTER_IHDR:]
  ),
  'a short animation chunk': lambda png: (
    png[:AFTER_IHDR] + chunk(b'acTL', struct.pack('>II', 2, 0)) + chunk(b'fcTL', b'\0' * 9)
    + png[AFTER_IHDR:]
  ),
}  # fmt: skip


@pytest.mark.parametrize('kind', IRREGULAR_PNGS)
def test_an_irregular_png_has_all_its_pixels(kind):
  assert np.array_equal(read(IRREGULAR_PNGS[kind](PNG)), photo())
  expected = np.rint(DEEP / 257).astype(np.uint8)
  deep = file(Image.fromarray(DEEP), 'PNG')
  assert np.array_equal(read(IRREGULAR_PNGS[kind](deep))[..., 0], expected)


def test_a_png_that_lacks_pixels_is_bad():
  for data in (PNG, file(Image.fromarray(DEEP), 'PNG')):
    for length in (len(data) // 2, len(data) * 9 // 10):
      with pytest.raises(BadImageError):
        read(data[:length])


def test_a_wrong_checksum_of_transparency_is_damage():
  clear = chunk(b'tRNS', b'\0\1\0\2\0\3', wrong_checksum=True)
  with pytest.raises(BadImageError, match='checksum of its tRNS'):
    read(PNG[:AFTER_IHDR] + clear + PNG[AFTER_IHDR:])


def test_the_orientation_of_a_png_with_other_metadata_is_used():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = file(photo(), 'PNG', exif=exif)
  assert read(IRREGULAR_PNGS['a text of 3 MB'](data), orient=True).shape == (117, 83, 3)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'BMP', 'TIFF', 'AVIF', 'JPEG2000'])
def test_bytes_after_the_end_of_other_formats_are_ignored(kind):
  data = file(photo(), kind)
  assert np.array_equal(read(data + b'junk' * 20), read(data))


def test_a_gif_without_its_last_byte_has_all_its_pixels():
  data = file(photo() // 64 * 64, 'GIF')
  assert data[-1:] == b';'
  assert np.array_equal(read(data[:-1]), read(data))
