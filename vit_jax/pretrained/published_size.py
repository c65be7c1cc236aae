"""Compare the size of a file with a published size, such as '393.69 MiB'."""

import math

SIZE_UNITS = {'MiB': 2**20, 'GiB': 2**30}
MAX_BYTES = 64 * 2**30  # For files whose size is not published.


def matches_published_size(count: int, size: str) -> bool:
  """Return whether a number of bytes is `size`, such as '393.69 MiB', to its printed precision."""
  number, unit = size.split()
  decimals = len(number.partition('.')[2])
  return abs(count / SIZE_UNITS[unit] - float(number)) <= 0.6 * 10**-decimals


def max_bytes(size: str) -> int:
  """Return the most bytes that a file of the published size has, or MAX_BYTES if it is unknown."""
  if not size:
    return MAX_BYTES
  number, unit = size.split()
  decimals = len(number.partition('.')[2])
  return math.floor((float(number) + 0.6 * 10**-decimals) * SIZE_UNITS[unit])


def describe_wrong_size(count: int, size: str) -> str:
  """Compare a number of bytes with the published size."""
  return f'has {count:,} bytes ({count / 2**20:.2f} MiB), but the published size is {size}'
