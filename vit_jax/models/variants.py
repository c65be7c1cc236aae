"""The shapes of Vision Transformers, by the names that the papers gave them."""

import dataclasses
import math
import re

from vit_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """Width d of a token, depth in blocks, hidden width of the MLP, attention heads, and the patch (height, width) in pixels."""

  width: int
  depth: int
  mlp: int
  heads: int
  patch: tuple[int, int]

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Patches along (height, width) of an image of `size`. UserError where the patch doesn't divide it."""
    if size[0] % self.patch[0] or size[1] % self.patch[1]:
      raise UserError(
        f'an image of {size[0]}x{size[1]} does not divide into patches of {self.patch[0]}x{self.patch[1]}: '
        'choose --config.data.size or the patch in --config.model.variant'
      )
    return size[0] // self.patch[0], size[1] // self.patch[1]

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2, as the papers count: without norms and head."""
    n, d = math.prod(self.grid(size)) + 1, self.width
    projections = 4 * d * d + 2 * d * self.mlp  # Multiply-adds for a token: q, k, v, out and the MLP.
    attention = 2 * n * d  # For a token: q kᵀ, and the weights times v.
    return 2 * (n * self.depth * (projections + attention) + n * 3 * math.prod(self.patch) * d)


# Ti, S: arXiv 2106.10270. B, L, H: arXiv 2010.11929, Table 1. s, g, G: arXiv 2106.04560. The others: big_vision, models/vit.py.
# name       width depth    mlp heads
VARIANTS = {
  'mu':       (32,    1,    128,  2),
  'Ti':      (192,   12,    768,  3),
  's':       (256,    6,   1024,  8),
  'S':       (384,   12,   1536,  6),
  'M':       (512,   12,   2048,  8),
  'B':       (768,   12,   3072, 12),
  'L':      (1024,   24,   4096, 16),
  'So400m': (1152,   27,   4304, 16),
  'H':      (1280,   32,   5120, 16),
  'g':      (1408,   40,   6144, 16),
  'g-opt':  (1536,   40,   6144, 16),
  'G':      (1664,   48,   8192, 16),
  'G-opt':  (1536,   48,   8192, 16),
  'e':      (1792,   56,  15360, 16),
}  # fmt: skip


def shape(variant: str, *, width: int = 0, depth: int = 0, mlp: int = 0, heads: int = 0) -> Shape:
  """The shape that 'B/16' (patches of 16x16) or 'B/16x8' (16 high, 8 wide) names; a number that is not 0 replaces the table's.

  UserError for a name that is not in the table, a patch that is no number, or heads that do not divide the width.
  """
  name, _, patch = variant.partition('/')
  if name not in VARIANTS:
    raise UserError(f'config.model.variant={variant!r}: there is no variant {name!r}.{did_you_mean(name, VARIANTS)}')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', patch):
    raise UserError(f"config.model.variant={variant!r}: expected NAME/PATCH with the patch's side in pixels, such as {name}/16")
  high, _, wide = patch.partition('x')
  width, depth, mlp, heads = (given or table for given, table in zip((width, depth, mlp, heads), VARIANTS[name], strict=True))
  if width % heads:
    raise UserError(f'config.model: a width of {width} does not divide into {heads} heads')
  return Shape(width, depth, mlp, heads, (int(high), int(wide or high)))
