"""Arrays in the HLO text of a program for a TPU: sides, bytes as laid out, and where they are.

'bf16[16,197,192]{2,1,0:T(8,128)(2,1)S(1)}': the sides, their order from the fastest on, the tiles
to which the last two are padded, and the memory. S(1) is vector memory; without S, it is HBM.
"""

import dataclasses
import math
import re

ARRAY = re.compile(r'\b(pred|token|opaque|[a-z]+\d\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
TILE = re.compile(r'T\(([\d,]+)\)')
SPACE = re.compile(r'S\(\d+\)')
BITS = re.compile(r'\D+(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
  """One array, or one part of a tuple."""

  dtype: str
  sides: tuple[int, ...]
  layout: str

  @property
  def elements(self) -> int:
    """Number of elements."""
    return math.prod(self.sides)

  @property
  def padded(self) -> int:
    """Number of elements with the padding of the tiles."""
    order, _, rest = self.layout.partition(':')
    sides, tile = list(self.sides), TILE.search(rest)
    fastest = [int(axis) for axis in order.split(',') if axis]
    multiples = [int(side) for side in tile[1].split(',')][::-1] if tile else []
    for axis, multiple in zip(fastest, multiples, strict=False):
      sides[axis] = -(-sides[axis] // multiple) * multiple
    return math.prod(sides)

  @property
  def bytes(self) -> float:
    """Bytes with the padding of the tiles."""
    bits = BITS.match(self.dtype)
    return self.padded * (int(bits[1]) if bits else 8) / 8

  @property
  def in_hbm(self) -> bool:
    """Return whether the array is in HBM."""
    return self.dtype not in ('token', 'opaque') and not SPACE.search(self.layout)


def parse_arrays(type_: str) -> list[Array]:
  """Return the arrays of a type: one, or those of a tuple."""
  return [
    Array(dtype, tuple(map(int, filter(None, sides.split(',')))), layout)
    for dtype, sides, layout in ARRAY.findall(type_)
  ]


def count_elements(type_: str) -> int:
  """Return the elements of all arrays of a type."""
  return sum(array.elements for array in parse_arrays(type_))


def count_padded(type_: str) -> int:
  """Return the elements of all arrays of a type, with the padding of the tiles."""
  return sum(array.padded for array in parse_arrays(type_))
