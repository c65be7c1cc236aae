"""Header of a JPEG file: its segments up to the first scan.

libjpeg decodes files with irregular headers, but reports the irregularity in the same way as damage
of the pixels. `repair_jpeg_header` removes what libjpeg ignores, so that only damage is reported.
"""

import struct
from typing import NamedTuple

START_OF_SCAN = 0xDA
START_OF_IMAGE, END_OF_IMAGE = 0xD8, 0xD9
STANDALONE_MARKERS = frozenset([0x01, *range(0xD0, 0xDA)])  # Markers without a length.
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SEQUENTIAL_FRAME_MARKERS = (0xC0, 0xC1, 0xC9)
HUFFMAN_FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
DEFINE_HUFFMAN_TABLES = 0xC4
RESTART_INTERVAL = 0xDD
# Huffman and arithmetic tables, quantization tables and the restart interval.
TABLE_MARKERS = (0xC4, 0xCC, 0xDB, 0xDD)
APPLICATION_1 = 0xE1  # The marker of EXIF and XMP metadata.
# The EXIF tag 0x0112 of type short or long, with one value, in both byte orders.
ORIENTATION_TAGS = (
  b'\x12\x01\x03\0\1\0\0\0',
  b'\x01\x12\0\x03\0\0\0\1',
  b'\x12\x01\x04\0\1\0\0\0',
  b'\x01\x12\0\x04\0\0\0\1',
)
UPRIGHT_VALUES = (b'\1\0\0\0', b'\0\1\0\0', b'\0\0\0\1')  # 1 as a short or a long.
XMP_ORIENTATION, XMP_UPRIGHT = b'tiff:Orientation', (b'="1"', b'>1<')
ALL_COEFFICIENTS = b'\x00\x3f\x00'  # The end of the header of a sequential scan.

JpegSegment = tuple[int, int, int]  # Marker; position of its first byte and of the next segment.


class JpegHeader(NamedTuple):
  """The fields of a JPEG header that decoding a part of the image needs."""

  height: int
  width: int
  height_offset: int  # Position in the file of the two bytes that hold the height.
  mcu_rows: int  # Pixel rows coded as one unit; 0 if the file is not a single top-to-bottom scan.


def read_jpeg_header(data: bytes) -> JpegHeader:
  """Read the header.

  Raises IndexError or struct.error if it is truncated, and ValueError if the parameters of the
  first scan are not valid.
  """
  segments = _list_segments(data)
  marker, frame = _find_frame(segments)
  height, width, components = struct.unpack_from('>HHB', data, frame + 5)
  mcu_rows = 8 * max(data[i] & 15 for i in range(frame + 11, frame + 11 + 3 * components, 3))
  restarts = RESTART_INTERVAL in [segment[0] for segment in segments]
  _, scan, stop = segments[-1]
  if marker in SEQUENTIAL_FRAME_MARKERS and data[stop - 3 : stop] != ALL_COEFFICIENTS:
    raise ValueError('the JPEG is corrupt: the parameters of its scan are not valid')
  one_scan = marker in (0xC0, 0xC1) and data[scan + 4] == components and not restarts
  return JpegHeader(height, width, frame + 5, mcu_rows if one_scan else 0)


def may_have_orientation(data: bytes) -> bool:
  """Return whether the metadata may say that the image is not upright.

  This takes a few microseconds, and reading EXIF and XMP metadata takes longer than some images.
  """
  for marker, start, stop in _list_segments(data):
    if marker == APPLICATION_1 and _may_turn(data[start + 4 : stop]):
      return True
  return False


def _may_turn(metadata: bytes) -> bool:
  at = metadata.find(XMP_ORIENTATION)
  if at >= 0 and not metadata.startswith(XMP_UPRIGHT, at + len(XMP_ORIENTATION)):
    return True
  places = [at for tag in ORIENTATION_TAGS if (at := metadata.find(tag)) >= 0]
  return any(metadata[at + 8 : at + 12] not in UPRIGHT_VALUES for at in places)


def repair_jpeg_header(data: bytes) -> bytes:
  """Return a JPEG with the same pixels whose header is regular.

  Bytes between segments and metadata are removed. Scans of a sequential JPEG get the only
  parameters that are valid for them; Samsung's phones write zeros.

  Raises ValueError if a Huffman table is missing. Its marker may be damaged, and libjpeg then
  decodes noise with a standard table.
  """
  segments = _list_segments(data)
  frame_marker, frame = _find_frame(segments)
  missing = _needed_tables(data, segments) - _defined_tables(data, segments)
  if missing and frame_marker in HUFFMAN_FRAME_MARKERS:
    raise ValueError('the JPEG is corrupt: a Huffman table is missing')
  out = [b'\xff\xd8']
  for marker, start, stop in segments:
    if marker in FRAME_MARKERS or marker in TABLE_MARKERS:
      out.append(data[start:stop])
    elif marker == 0xE0 and data[start + 4 : start + 9] == b'JFIF\0':
      out.append(data[start : start + 9] + b'\x01' + data[start + 10 : stop])  # Major version 1.
    elif marker == 0xEE and data[start + 4 : start + 9] == b'Adobe' and stop - start >= 16:
      components = data[frame + 9]
      transform = min(data[start + 15], 2 if components == 4 else 1)  # Unknown ones are YCC.
      out.append(data[start : start + 15] + bytes([transform]) + data[start + 16 : stop])
  scans = data[segments[-1][1] :]
  out.append(_repair_scans(scans) if frame_marker in SEQUENTIAL_FRAME_MARKERS else scans)
  return b''.join(out)


def _needed_tables(data: bytes, segments: list[JpegSegment]) -> set[int]:
  """Return the Huffman tables of the first scan: 0 to 3 for DC, 16 to 19 for AC coefficients."""
  _, at, stop = segments[-1]
  selectors = data[at + 6 : at + 6 + 2 * data[at + 4] : 2]
  tables = {16 + (selector & 15) for selector in selectors}
  if data[stop - 3] == 0:  # The scan has DC coefficients; of a progressive JPEG, no others.
    dc_tables = {selector >> 4 for selector in selectors}
    progressive = _find_frame(segments)[0] not in SEQUENTIAL_FRAME_MARKERS
    tables = dc_tables if progressive else tables | dc_tables
  return tables


def _defined_tables(data: bytes, segments: list[JpegSegment]) -> set[int]:
  """Return the Huffman tables that are defined before the first scan."""
  tables = set()
  for marker, start, stop in segments:
    at = start + 4
    while marker == DEFINE_HUFFMAN_TABLES and at + 17 <= stop:
      tables.add(data[at])
      at += 17 + sum(data[at + 1 : at + 17])
  return tables


def _repair_scans(data: bytes) -> bytes:
  """Set the parameters of all scans of a sequential JPEG."""
  out, at = bytearray(data), 0
  while (at := data.find(b'\xff\xda', at)) >= 0 and at + 5 <= len(data):
    stop = at + 2 + int.from_bytes(data[at + 2 : at + 4])
    if stop - at == 8 + 2 * data[at + 4] and stop <= len(data):
      out[stop - 3 : stop] = ALL_COEFFICIENTS
    at += 2
  return bytes(out)


def _list_segments(data: bytes) -> list[JpegSegment]:
  """Return the segments up to the first scan header, skipping the bytes that libjpeg skips."""
  segments, at, marker = [], 2, 0
  while marker != START_OF_SCAN:
    while data[at] != 0xFF or data[at + 1] in (0, 0xFF):
      at += 1
    marker = data[at + 1]
    if marker in STANDALONE_MARKERS:
      if marker in (START_OF_IMAGE, END_OF_IMAGE):
        raise ValueError('the JPEG is corrupt: it has no image data')
      at += 2
      continue
    stop = at + 2 + ((data[at + 2] << 8 | data[at + 3]) or 2)
    segments.append((marker, at, stop))
    at = stop
  return segments


def _find_frame(segments: list[JpegSegment]) -> tuple[int, int]:
  """Return (marker, start) of the frame header."""
  for marker, start, _ in segments:
    if marker in FRAME_MARKERS:
      return marker, start
  raise ValueError('the JPEG is corrupt: the frame header is missing')
