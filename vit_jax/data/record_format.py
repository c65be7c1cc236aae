"""Positions and contents of records in an ArrayRecord file, from ranges of its bytes.

ArrayRecord's own reader takes the path of a local file. These functions take the bytes that were
read from object storage. The layout is that of Riegeli/records
(github.com/google/riegeli, doc/riegeli_records_file_format.md):

    block     64 KiB, which begin with a header of 24 bytes, in the middle of a chunk too
    chunk     a header of 40 bytes; a byte, 0 if not compressed; the number of bytes of the sizes of
              its records; their sizes; the records. Numbers are varints
    footer    a chunk with the position of each chunk of records, as protobufs
    last block  a chunk with the position of the footer

`data pack` writes a record to a chunk, not compressed.
"""

import itertools
import struct

import numpy as np

BLOCK_BYTES = 1 << 16
BLOCK_HEADER_BYTES = 24
# The hash of the header, size of the data, its hash, the type and number of records, their size.
_CHUNK_HEADER = struct.Struct('<QQQQQ')
_RECORDS = ord('r')
_FOOTER_TAGS = (0x08, 0x10, 0x18)  # Position, size and number of records of a chunk.


def read_record(data: bytes, position: int) -> bytes:
  """Return the record of the chunk that `data`, read from `position` of a file, is.

  Raises ValueError if it is not a chunk of one record.
  """
  records = _read_chunk(data, position)
  if len(records) != 1:
    raise ValueError(f'a chunk of {len(records)} records; expected what `data pack` writes')
  return records[0]


def read_footer_position(block: bytes, file_bytes: int) -> int:
  """Return the position of the footer, given the last block of a file.

  Raises ValueError if the file does not end as ArrayRecord files do.
  """
  first = file_bytes - BLOCK_BYTES
  if first <= 0 or file_bytes % BLOCK_BYTES or len(block) != BLOCK_BYTES:
    raise ValueError(f'{file_bytes:,} bytes are not an ArrayRecord file')
  fields = _decode_varints(_read_chunk(block, first, is_padded=True)[0])
  position = int(fields[1]) if len(fields) == 4 and fields[0] == 0x08 else -1
  if not 0 < position < first:
    raise ValueError('it does not end as an ArrayRecord file')
  return position


def read_chunk_ends(footer: bytes, position: int) -> np.ndarray:
  """Return the positions [n + 1] of the chunks of records, of which the last is the footer's.

  Raises ValueError if `footer`, read from `position` of a file, is not valid.
  """
  _, *entries = _read_chunk(footer, position, is_padded=True)
  fields = _decode_varints(b''.join(entries))
  if len(fields) != 6 * len(entries):
    raise ValueError('the footer is damaged')
  fields = fields.reshape(-1, 6)
  positions = np.append(fields[:, 1], np.uint64(position)).astype(np.int64)
  is_valid = (fields[:, ::2] == _FOOTER_TAGS).all() and (fields[:, 5] == 1).all()
  if not is_valid or (np.diff(positions) <= _CHUNK_HEADER.size).any():
    raise ValueError('the footer is damaged, or a chunk has several records')
  return positions


def _read_chunk(data: bytes, position: int, *, is_padded: bool = False) -> list[bytes]:
  """Return the records of a chunk. With `is_padded`, other bytes may follow it."""
  data = _strip_block_headers(data, position)
  if len(data) < _CHUNK_HEADER.size:
    raise ValueError(f'{len(data)} bytes are too few for a chunk')
  _, size, _, kind, decoded_size = _CHUNK_HEADER.unpack_from(data)
  data, count = data[_CHUNK_HEADER.size :], kind >> 8
  if kind & 0xFF != _RECORDS or size > len(data) or (size < len(data) and not is_padded):
    raise ValueError('it is not a chunk of records')
  data = data[:size]
  if data[:1] != b'\0':
    raise ValueError('it is compressed; expected what `data pack` writes')
  length, begin = _read_varint(data, 1)
  sizes, at, end = [], begin, begin + length
  while at < end:
    value, at = _read_varint(data, at)
    sizes.append(value)
  ends = list(itertools.accumulate(sizes, initial=end))
  if len(sizes) != count or not count or ends[-1] != size or sum(sizes) != decoded_size:
    raise ValueError('the sizes of its records are damaged')
  return [data[start:stop] for start, stop in itertools.pairwise(ends)]


def _strip_block_headers(data: bytes, position: int) -> bytes:
  first = -position % BLOCK_BYTES
  if first >= len(data):
    return data
  blocks = range(first, len(data), BLOCK_BYTES)
  parts = [data[block + BLOCK_HEADER_BYTES : block + BLOCK_BYTES] for block in blocks]
  return b''.join([data[:first], *parts])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
  """Return (the varint at `at`, the position after it). Raises ValueError if it is cut."""
  value = 0
  for place in range(10):
    if at + place >= len(data):
      break
    byte = data[at + place]
    value |= (byte & 0x7F) << 7 * place
    if byte < 0x80:
      return value, at + place + 1
  raise ValueError('a number is cut')


def _decode_varints(data: bytes) -> np.ndarray:
  """Return the varints that `data` is, uint64 [n]. Raises ValueError if it is not such."""
  values = np.frombuffer(data, np.uint8)
  ends = np.flatnonzero(values < 0x80)
  if not len(ends) or ends[-1] != len(values) - 1:
    raise ValueError('a number is cut')
  starts = np.append(0, ends[:-1] + 1)
  lengths = ends - starts + 1
  if lengths.max() > 10:
    raise ValueError('a number is too long')
  places = np.arange(len(values)) - np.repeat(starts, lengths)
  return np.add.reduceat(
    (values & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64), starts
  )
