"""Formats, bit depths and transparency: expected pixels are calculated by hand or by Pillow."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.data.photo import file, photo
from vit_jax.data.decode import BadImageError, decode_image

POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n'


def read(data, **kwargs) -> np.ndarray:
  return decode_image(data, **{'name': 'a', 'max_pixels': 10**8} | kwargs)


def make_png(bits: int, color: int, samples: np.ndarray, *, trns=None, palette=None) -> bytes:
  """Encode samples [h, w, c] by the PNG specification."""

  def chunk(kind: bytes, contents: bytes) -> bytes:
    checksum = zlib.crc32(kind + contents)
    return struct.pack('>I', len(contents)) + kind + contents + struct.pack('>I', checksum)

  rows = []
  for row in samples.reshape(len(samples), -1):
    if bits < 8:
      row = np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:])
    rows.append(b'\0' + row.astype('>u2' if bits == 16 else np.uint8).tobytes())
  header = struct.pack('>IIBBBBB', samples.shape[1], len(samples), bits, color, 0, 0, 0)
  optional = [
    chunk(kind, contents) for kind, contents in ((b'PLTE', palette), (b'tRNS', trns)) if contents
  ]
  pixels = chunk(b'IDAT', zlib.compress(b''.join(rows)))
  return b''.join(
    [b'\x89PNG\r\n\x1a\n', chunk(b'IHDR', header), *optional, pixels, chunk(b'IEND', b'')]
  )


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('is_clear', [False, True])
def test_the_transparent_level_of_a_gray_png_is_white(bits, is_clear):
  top = 2**bits - 1
  samples = np.unique([0, 1, top // 3, top // 2, top]).reshape(1, -1, 1)
  for level in samples.ravel():
    data = make_png(bits, 0, samples, trns=struct.pack('>H', level) if is_clear else None)
    expected = np.rint(samples / top * 255)
    expected[is_clear & (samples == level)] = 255
    assert np.array_equal(read(data), np.broadcast_to(expected, (1, samples.shape[1], 3)))


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('is_clear', [False, True])
def test_the_transparent_color_of_a_png_is_white(bits, is_clear):
  top = 2**bits - 1
  samples = np.array([[[0, 1, 2], [top, 0, top // 2], [1, 1, 2], [top // 3, 9, 200]]])
  color = struct.pack('>HHH', *samples[0, 0])
  expected = np.rint(samples / top * 255)
  if is_clear:
    expected[0, 0] = 255
  assert np.array_equal(
    read(make_png(bits, 2, samples, trns=color if is_clear else None)), expected
  )


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_the_transparency_of_a_palette_is_composited_on_white(bits):
  samples = np.array([[[0], [1], [1], [0]]])
  data = make_png(bits, 3, samples, trns=b'\x80', palette=bytes([10, 20, 30, 40, 50, 60]))
  half = [round((c * 128 + 255 * 127) / 255) for c in (10, 20, 30)]
  assert read(data).tolist() == [[half, [40, 50, 60], [40, 50, 60], half]]


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('color', [4, 6])
def test_an_alpha_channel_of_a_png_is_composited_on_white(bits, color):
  top = 2**bits - 1
  channels = 2 if color == 4 else 4
  samples = np.random.default_rng(0).integers(0, top + 1, (5, 6, channels))
  alpha = samples[..., -1:] / top
  expected = np.broadcast_to(samples[..., :-1] / top * 255 * alpha + 255 * (1 - alpha), (5, 6, 3))
  assert np.abs(read(make_png(bits, color, samples)) - expected).max() <= 1.5  # Two roundings.


def test_twelve_bits_of_a_tiff_are_scaled_by_their_range():
  values = np.array([[0, 1365, 2730, 4095]])
  packed = bytes([0x00, 0x05, 0x55, 0xAA, 0xAF, 0xFF])
  tags = [
    (256, 4),
    (257, 1),
    (258, 12),
    (259, 1),
    (262, 1),
    (273, 200),
    (277, 1),
    (278, 1),
    (279, 6),
  ]
  entries = b''.join(struct.pack('<HHII', tag, 3, 1, value) for tag, value in tags)
  data = b'II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + bytes(4)
  data = data.ljust(200, b'\0') + packed
  assert np.array_equal(read(data)[..., 0], np.rint(values / 4095 * 255))


def test_sixteen_bits_of_a_pgm_are_rounded_to_eight():
  values = np.array([[0, 128, 129, 32768, 65535]], '>u2')
  got = read(b'P5 5 1 65535\n' + values.tobytes())
  assert np.array_equal(got[..., 1], np.rint(values / 257))


@pytest.mark.parametrize('kind', ['AVIF', 'JPEG2000', 'TIFF', 'WEBP', 'GIF', 'BMP', 'DIB', 'PPM'])
def test_a_file_equals_what_pillow_reads(kind):
  data = file(photo(), kind)
  assert np.array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert('RGB')))


def test_a_heic_photo_is_read_if_pillow_heif_is_installed():
  heif = pytest.importorskip('pillow_heif')
  out = io.BytesIO()
  heif.from_pillow(Image.fromarray(photo())).save(out, quality=95)
  got = read(out.getvalue()).astype(int)
  assert got.shape == photo().shape
  assert np.abs(got - photo()).mean() < 4


def test_a_heic_photo_without_pillow_heif_is_an_error_that_names_the_extra(monkeypatch):
  from vit_jax.data import decode

  monkeypatch.setattr(decode, '_installed_formats', lambda: ('JPEG', 'PNG'))
  data = b'\0\0\0\x18ftypheic' + bytes(12)
  with pytest.raises(BadImageError, match=r"HEIF.*pip install 'vit-jax\[heic\]'"):
    read(data)


@pytest.fixture
def no_programs(monkeypatch):
  """Fail if a program is started, or if one named `gs` would be found."""

  def refuse(*args, **kwargs):
    raise AssertionError(f'a program was started: {args}')

  for name in ('Popen', 'run', 'call', 'check_call', 'check_output'):
    monkeypatch.setattr(f'subprocess.{name}', refuse)
  monkeypatch.setattr(os, 'system', refuse)
  monkeypatch.setattr('PIL.EpsImagePlugin.has_ghostscript', refuse)
  monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', refuse)


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (POSTSCRIPT, 'EPS files are not read'),
    (b'\xc5\xd0\xd3\xc6' + struct.pack('<II', 32, len(POSTSCRIPT)) + bytes(20) + POSTSCRIPT, 'EPS'),
    (b'\xd7\xcd\xc6\x9a\0\0' + bytes(34), 'WMF files are not read'),
    (b'%PDF-1.4\n', 'format is unknown'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'format is unknown'),
    (b'BUFR\0\0\0\4', 'BUFR files are not read'),
    (b'\x89HDF\r\n\x1a\n' + bytes(20), 'HDF5 files are not read'),
    (b'8BPS\0\1' + bytes(30), 'PSD files are not read'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'format is unknown'),
  ],
)
def test_other_formats_are_refused_by_name_and_start_no_program(no_programs, data, reason):
  with pytest.raises(BadImageError, match=reason):
    read(data)


def test_every_format_that_is_read_is_named_when_it_is_opened(monkeypatch):
  seen, open_image = [], Image.open

  def record(*args, formats=None, **kwargs):
    seen.append(formats)
    return open_image(*args, formats=formats, **kwargs)

  monkeypatch.setattr(Image, 'open', record)
  exif = Image.Exif()
  exif[0x0112] = 3
  for kind in ('JPEG', 'PNG', 'GIF'):
    read(file(photo(), kind, exif=exif), orient=True)
  assert len(seen) == 3
  assert all(seen)
  assert not {'EPS', 'WMF', 'FITS', 'PDF'}.intersection(*seen)


def test_the_package_opens_images_only_where_formats_are_named():
  root = Path(vit_jax.__file__).parent
  calls = {}
  for path in root.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      name = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
      if name in ('Image.open', 'PIL.Image.open') or name.endswith('.imread'):
        calls[path.name] = [keyword.arg for keyword in node.keywords]
  assert calls == {'decode.py': ['formats']}
