"""EXIF orientation of decoded images."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from tests.data.photo import file, photo
from vit_jax.data.decode import decode_image

ORIENTATION = 0x0112
BOXES = [(0, 0, 1, 1), (3, 5, 40, 60), (20, 11, 30, 7), (0, 40, 80, 40)]


def read(data, **kwargs) -> np.ndarray:
  return decode_image(data, **{'name': 'a', 'max_pixels': 10**8} | kwargs)


def oriented(kind: str, orientation: int, **options) -> bytes:
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  lossless = {'lossless': True} if kind == 'WEBP' else {}
  return file(photo(), kind, exif=exif, **lossless, **options)


def upright_by_pillow(data: bytes) -> np.ndarray:
  return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_exif_orientation_is_ignored_by_default(kind):
  for orientation in range(1, 9):
    got = read(oriented(kind, orientation)).astype(int)
    assert np.abs(got - photo()).mean() < 3


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'AVIF'])
def test_an_oriented_image_equals_pillows(kind):
  for orientation in range(1, 9):
    data = oriented(kind, orientation)
    ours = read(data, orient=True, fast_dct=False)
    theirs = upright_by_pillow(data)
    assert ours.shape == theirs.shape
    assert ours.flags.c_contiguous
    assert np.abs(ours.astype(int) - theirs).max() <= (4 if kind == 'JPEG' else 0)


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 2}], ids=str)
def test_a_box_of_a_jpeg_refers_to_the_oriented_image(options):
  for orientation in range(1, 9):
    data = oriented('JPEG', orientation, **options)
    full = read(data, orient=True)
    for y, x, h, w in BOXES:
      sizes = []

      def choose(height, width, sizes=sizes, box=(y, x, h, w)):
        sizes.append((height, width))
        return box

      box = read(data, orient=True, box=choose)
      assert sizes == [full.shape[:2]]
      assert np.array_equal(box, full[y : y + h, x : x + w])


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'TIFF'])
def test_a_box_of_other_formats_refers_to_the_oriented_image(kind):
  for orientation in (3, 6):
    data = oriented(kind, orientation)
    theirs = upright_by_pillow(data)
    assert np.array_equal(
      read(data, orient=True, box=lambda *_: (3, 5, 40, 60)), theirs[3:43, 5:65]
    )


def test_a_box_of_an_upside_down_jpeg_is_decoded_only_down_to_its_last_stored_row(monkeypatch):
  data = oriented('JPEG', 3)
  decode, rows = simplejpeg.decode_jpeg, []

  def record(data, *args, buffer, **kwargs):
    rows.append(len(buffer))
    return decode(data, *args, buffer=buffer, **kwargs)

  monkeypatch.setattr(simplejpeg, 'decode_jpeg', record)
  read(data, orient=True, box=lambda *_: (73, 0, 10, 117))  # The first ten stored rows.
  read(data, orient=True, box=lambda *_: (0, 0, 10, 117))
  assert rows[0] <= 32
  assert rows[1] == 83


@pytest.mark.parametrize('orientation', [1, 3, 6])
@pytest.mark.parametrize(
  'form', ['<rdf:Description tiff:Orientation="{}"/>', '<tiff:Orientation>{}</tiff:Orientation>']
)
def test_the_orientation_in_xmp_is_used_as_by_pillow(orientation, form):
  xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{form.format(orientation)}</x:xmpmeta>'
  data = file(photo(), 'JPEG', xmp=xmp.encode())
  got = read(data, orient=True)
  assert np.array_equal(got, np.rot90(read(data), {1: 0, 3: 2, 6: -1}[orientation]))
  assert got.shape == upright_by_pillow(data).shape


@pytest.mark.parametrize('orientation', [0, 9, 65535])
def test_an_undefined_orientation_is_upright(orientation):
  assert np.array_equal(read(oriented('PNG', orientation), orient=True), photo())


@pytest.mark.parametrize('exif', [b'Exif\0\0', b'Exif\0\0MM\0', b'Exif\0\0II*\0\xff\xff\xff\xff'])
def test_damaged_metadata_does_not_make_an_image_unreadable(exif):
  assert read(file(photo(), 'JPEG', exif=exif), orient=True).shape == (83, 117, 3)
  assert np.array_equal(read(file(photo(), 'PNG', exif=exif), orient=True), photo())


def test_pixels_have_no_orientation():
  assert np.array_equal(read(photo(), orient=True), photo())


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('kind', ['H', 'I'])
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_both_byte_orders_and_integer_types_of_exif_are_read(order, kind, orientation):
  value = struct.pack(order + kind, orientation).ljust(4, b'\0')
  entry = struct.pack(f'{order}HHI', ORIENTATION, 3 if kind == 'H' else 4, 1) + value
  start = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}I', 8)
  exif = b'Exif\0\0' + start + struct.pack(f'{order}H', 1) + entry + bytes(4)
  data = file(photo(), 'JPEG', exif=exif)
  turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
  assert np.array_equal(read(data, orient=True), np.rot90(read(data), turns))
  assert upright_by_pillow(data).shape == read(data, orient=True).shape
