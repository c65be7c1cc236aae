"""Chunks of a PNG file, of which decoders need only those that hold pixels."""

import struct
import zlib

SIGNATURE_BYTES = 8
EMPTY_CHUNK_BYTES = 12  # Length, kind and checksum.
IEND_CHUNK = b'\0\0\0\0IEND\xaeB`\x82'
# Chunks that change no pixel of the default image.
METADATA_CHUNKS = frozenset(
  b'acTL bKGD cHRM cICP cLLI eXIf fcTL fdAT gAMA hIST iCCP iTXt mDCV oFFs pCAL pHYs sBIT sCAL sPLT '
  b'sRGB tEXt tIME zTXt'.split()
)
TEXT_CHUNKS = (b'iTXt', b'tEXt', b'zTXt')
# Text chunks that Pillow reads the orientation from begin with one of these keywords.
NEEDED_KEYWORDS = (b'XML:com.adobe.xmp\0', b'Raw profile type exif\0', b'Raw profile type APP1\0')
MAX_TEXT_CHUNK_BYTES = 1 << 20  # Pillow refuses an image with a larger text.


def select_png_chunks(data: bytes) -> bytes:
  """Return a PNG with the same pixels and orientation that has no other chunks.

  Decoders refuse images for a damaged or very large color profile, text or animation, or because
  the last chunk is missing, though all pixels are there.

  Raises ValueError if a checksum of pixels does not match, because Pillow ignores those.
  """
  kept, at, kind = [data[:SIGNATURE_BYTES]], SIGNATURE_BYTES, b''
  while kind != b'IEND' and at + EMPTY_CHUNK_BYTES <= len(data):
    length, kind = struct.unpack_from('>I4s', data, at)
    stop = at + EMPTY_CHUNK_BYTES + length
    chunk = memoryview(data)[at:stop]
    if stop > len(data):  # The decoder finds out whether the chunk has all pixels.
      kept.append(_make_chunk(kind, data[at + 8 :]))
    elif kind in METADATA_CHUNKS:
      kept += [chunk] if _holds_orientation(kind, chunk) and _has_valid_checksum(chunk) else []
    elif _has_valid_checksum(chunk):
      kept.append(chunk)
    else:
      name = kind.decode(errors='replace')
      raise ValueError(f'the PNG is corrupt: the checksum of its {name} chunk does not match')
    at = stop
  if kind != b'IEND':
    kept.append(IEND_CHUNK)
  return b''.join(kept) if sum(map(len, kept)) != len(data) else data


def find_png_chunk(data: bytes, wanted: bytes) -> bytes | None:
  """Return the contents of the first chunk of a kind, or None."""
  at = SIGNATURE_BYTES
  while at + EMPTY_CHUNK_BYTES <= len(data):
    length, kind = struct.unpack_from('>I4s', data, at)
    if kind == wanted:
      return data[at + 8 : at + 8 + length]
    at += EMPTY_CHUNK_BYTES + length
  return None


def _holds_orientation(kind: bytes, chunk: memoryview) -> bool:
  if kind == b'eXIf':
    return True
  has_keyword = kind in TEXT_CHUNKS and bytes(chunk[8:40]).startswith(NEEDED_KEYWORDS)
  return has_keyword and len(chunk) <= MAX_TEXT_CHUNK_BYTES


def _has_valid_checksum(chunk: memoryview) -> bool:
  return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _make_chunk(kind: bytes, contents: bytes) -> bytes:
  checksum = zlib.crc32(kind + contents)
  return struct.pack('>I', len(contents)) + kind + contents + checksum.to_bytes(4)
