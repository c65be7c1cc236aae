"""The shapes of Vision Transformers and of BiT's ResNets, by the names that the papers gave them."""

import dataclasses
import math
import re
from collections.abc import Callable

from vit_jax.errors import UserError, did_you_mean


def conv3x3_multiply_adds(size: tuple[int, int], c: int, stride: int) -> int:
  """Multiply-adds of a 3x3 convolution that strides over [h, w, c]."""
  return conv_taps(size, 3, stride) * c * c


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetBackbone:
  """The convolutions of a ResNet: blocks in each of its stages, and channels of its first convolution."""

  blocks: tuple[int, ...]
  width: int

  @property
  def stride(self) -> int:
    """Pixels between two places of what it gives: 4 for its root, and 2 more for each stage after the first."""
    return 4 * 2 ** max(0, len(self.blocks) - 1)

  @property
  def channels(self) -> int:
    """Of what it gives."""
    return self.width * 4 * 2 ** (len(self.blocks) - 1) if self.blocks else self.width

  def multiply_adds(
    self,
    size: tuple[int, int],
    spatial: Callable[[tuple[int, int], int, int], int] = conv3x3_multiply_adds,
  ) -> int:
    """Of its layers over an image of `size`; `spatial` gives those of a unit's second for (size, channels, stride)."""
    total = conv_taps(size, 7, 2) * 3 * self.width
    (h, w), channels = (-(-side // 4) for side in size), self.width
    for stage, blocks in enumerate(self.blocks):
      c = self.width * 2**stage
      for block in range(blocks):
        stride = 2 if stage and not block else 1  # Of the second layer.
        total += h * w * channels * c + spatial((h, w), c, stride)
        h, w = -(-h // stride), -(-w // stride)
        total += (
          h * w * 4 * c * (c if block else c + channels)
        )  # The first of a stage projects its shortcut.
        channels = 4 * c
    return total


def conv_taps(size: tuple[int, int], kernel: int, stride: int) -> int:
  """Products of an image of one channel with a kernel x kernel filter that strides, without those with padding: so XLA
  counts, and so Table 6 must have been counted, whose ResNets all come out within 2 % this way and up to 4 % off with them."""
  total = 1
  for side in size:
    places = -(-side // stride)
    before = max((places - 1) * stride + kernel - side, 0) // 2
    starts = range(-before, places * stride - before, stride)
    total *= sum(min(side, start + kernel) - max(0, start) for start in starts)
  return total


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetShape:
  """The stages of a ResNet, and whether its activations come before the convolutions (V2: as published) or after (V1)."""

  stem: ResNetBackbone
  preactivated: bool

  @property
  def width(self) -> int:
    """Of the features."""
    return self.stem.channels

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) between two places of the last feature map."""
    return self.stem.stride, self.stem.stride

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Places along (height, width) of the last feature map for an image of `size`, which may be any."""
    return -(-size[0] // self.stem.stride), -(-size[1] // self.stem.stride)

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    return 2.0 * self.stem.multiply_adds(size)


@dataclasses.dataclass(frozen=True, slots=True)
class ViTShape:
  """Width d of a token, depth in blocks, hidden width of the MLP, attention heads, and the patch (height, width).

  The patch is in pixels, or in places of what the stem gives, where there is one.
  """

  width: int
  depth: int
  mlp: int
  heads: int
  patch: tuple[int, int]
  stem: ResNetBackbone | None = None

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) that a token stands for."""
    step = self.stem.stride if self.stem else 1
    return self.patch[0] * step, self.patch[1] * step

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens along (height, width) of an image of `size`. UserError where the patch doesn't divide it."""
    high, wide = self.stride
    if size[0] % high or size[1] % wide:
      raise UserError(
        f'an image of {size[0]}x{size[1]} does not divide into patches of {high}x{wide}: '
        'choose --config.data.size or the patch in --config.model.variant'
      )
    return size[0] // high, size[1] // wide

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2, as the papers count: without norms and head."""
    patches, d = math.prod(self.grid(size)), self.width
    n = patches + 1
    projections = (
      4 * d * d + 2 * d * self.mlp
    )  # Multiply-adds for a token: q, k, v, out and the MLP.
    attention = 2 * n * d  # For a token: q kᵀ, and the weights times v.
    embedding = patches * (self.stem.channels if self.stem else 3) * math.prod(self.patch) * d
    stem = self.stem.multiply_adds(size) if self.stem else 0
    return 2 * (n * self.depth * (projections + attention) + embedding + stem)


NORM_GROUPS = 32  # Of a ResNet's norms.

# Ti, S: arXiv 2106.10270. B, L, H: arXiv 2010.11929, Table 1. s, g, G: arXiv 2106.04560. The others: big_vision, models/vit.py.
# name       width depth    mlp heads
VIT_VARIANTS = {
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


# Hybrids: arXiv 2010.11929 §4.1 and the released code. The number after the slash is the whole stride, not a patch: R50+B/16
# has the fourth stage's blocks in the third. R+Ti/16 strides by 32, whatever its name says.
# name   stride  blocks        patch on their output
HYBRID_BACKBONES = {
  ('R50', '16'): ((3, 4, 9),    1),
  ('R50', '32'): ((3, 4, 6, 3), 1),
  ('R26', '32'): ((2, 2, 2, 2), 1),
  ('R',   '16'): ((),           8),
}  # fmt: skip


# arXiv 1912.11370 and its code.
RESNET_VARIANTS = {
  'R26':  (2, 2, 2, 2),
  'R50':  (3, 4, 6, 3),
  'R101': (3, 4, 23, 3),
  'R152': (3, 8, 36, 3),
  'R200': (3, 24, 36, 3),
}  # fmt: skip


def resnet_shape(variant: str, *, stem_width: int = 64, prefix: str = '') -> ResNetShape:
  """The shape that 'R50x1' (V1) or 'BiT-R50x1' (V2) names; all channels times the number after the x.

  'R1.2x1' has two stages, of 1 and 2 blocks. What comes before is the family's `prefix`. UserError for a depth that is
  not in the table, or channels that the norms' groups don't divide.
  """
  bit, name, factor = re.fullmatch(r'(BiT-)?(R[\d.]+)x(\d+)', variant.removeprefix(prefix)).groups()
  if '.' not in name and name not in RESNET_VARIANTS:
    raise UserError(
      f'config.model.variant={variant!r}: there is no ResNet {name!r}.{did_you_mean(name, RESNET_VARIANTS)}'
    )
  blocks = (
    RESNET_VARIANTS[name] if name in RESNET_VARIANTS else tuple(map(int, name[1:].split('.')))
  )
  return ResNetShape(ResNetBackbone(blocks, check_stem_width(stem_width) * int(factor)), bool(bit))


def check_stem_width(width: int) -> int:
  """The channels of a stem. UserError where the groups of its norms don't divide them."""
  if width % NORM_GROUPS:
    raise UserError(
      f'config.model.stem_width={width}: expected a multiple of the {NORM_GROUPS} groups of its norms'
    )
  return width


def vit_shape(
  variant: str,
  *,
  width: int = 0,
  depth: int = 0,
  mlp: int = 0,
  heads: int = 0,
  stem_width: int = 64,
  prefix: str = '',
) -> ViTShape:
  """The shape that 'B/16' (patches of 16x16), 'B/16x8' (16 high, 8 wide) or 'R50+B/16' (a hybrid) names.

  'R2.1+B/16' is a hybrid whose ResNet has stages of 2 and 1 blocks. What comes before such a name is its family's `prefix`.
  A number that is not 0 replaces the table's. UserError for a name that is not in the tables, a patch that is no number, or
  heads that do not divide the width.
  """
  name, _, patch = variant.removeprefix(prefix).partition('/')
  resnet, plus, name = name.rpartition('+')
  if name not in VIT_VARIANTS:
    raise UserError(
      f'config.model.variant={variant!r}: there is no variant {name!r}.{did_you_mean(name, VIT_VARIANTS)}'
    )
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', patch):
    raise UserError(
      f"config.model.variant={variant!r}: expected NAME/PATCH with the patch's side in pixels, such as {prefix}{name}/16"
    )
  width, depth, mlp, heads = (
    given or table
    for given, table in zip((width, depth, mlp, heads), VIT_VARIANTS[name], strict=True)
  )
  if width % heads:
    raise UserError(f'config.model: a width of {width} does not divide into {heads} heads')
  if plus:
    stem, side = _hybrid_backbone(variant, resnet, patch, check_stem_width(stem_width))
    return ViTShape(width, depth, mlp, heads, (side, side), stem)
  high, _, wide = patch.partition('x')
  return ViTShape(width, depth, mlp, heads, (int(high), int(wide or high)))


def _hybrid_backbone(
  variant: str, resnet: str, stride: str, width: int
) -> tuple[ResNetBackbone, int]:
  """(the ResNet of a hybrid, the side of a patch on what it gives)."""
  if (resnet, stride) in HYBRID_BACKBONES:
    blocks, patch = HYBRID_BACKBONES[resnet, stride]
    return ResNetBackbone(blocks, width), patch
  if re.fullmatch(r'R[1-9]\d*(\.[1-9]\d*)+', resnet) and stride.isdigit():
    stem = ResNetBackbone(tuple(map(int, resnet[1:].split('.'))), width)
    if int(stride) % stem.stride == 0:
      return stem, int(stride) // stem.stride
    raise UserError(
      f'config.model.variant={variant!r}: a stride of {stride} is no multiple of the {stem.stride} of {resnet}'
    )
  known = ', '.join(f'{name}+…/{total}' for name, total in HYBRID_BACKBONES)
  raise UserError(
    f'config.model.variant={variant!r}: the hybrids are {known}, or R3.4.9+…/16 with the blocks of each stage'
  )


AXIAL_VIT_PREFIX = 'AxialViT-'


AXIAL_RESNET_PREFIX = 'Axial'  # Before 'R50x1'.


AXIAL_RESNET_HEADS = 8  # Of an AxialResNet, each query and key half as wide as a value (scenic, baselines/axial_resnet.py).


@dataclasses.dataclass(frozen=True, slots=True)
class AxialViTShape(ViTShape):
  """Of an Axial-ViT, whose blocks are two, along rows and along columns of the grid, and which has no class token."""

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    (h, w), d = self.grid(size), self.width
    projections = 2 * (
      4 * d * d + 2 * d * self.mlp
    )  # Multiply-adds for a token: q, k, v, out and the MLP, along either side.
    attention = (
      2 * (h + w) * d
    )  # For a token: q kᵀ, and the weights times v, with the w of its row and the h of its column.
    embedding = 3 * math.prod(self.patch) * d
    return 2 * h * w * (self.depth * (projections + attention) + embedding)


def axial_vit_shape(variant: str, **numbers: int) -> AxialViTShape:
  """The shape that 'AxialViT-B/16' names. Numbers and errors are those of `vit_shape`."""
  plain = vit_shape(variant, prefix=AXIAL_VIT_PREFIX, **numbers)
  return AxialViTShape(plain.width, plain.depth, plain.mlp, plain.heads, plain.patch)


@dataclasses.dataclass(frozen=True, slots=True)
class AxialResNetShape(ResNetShape):
  """Of an AxialResNet, which attends along rows and columns in the place of 3x3 convolutions."""

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    return 2.0 * self.stem.multiply_adds(
      size, lambda size, c, stride: axial_attention_multiply_adds(size, c)
    )


def axial_attention_multiply_adds(size: tuple[int, int], c: int) -> int:
  """Multiply-adds along the rows and the columns of [h, w, c]: q, k and v; three terms of the scores, and two of the values."""
  h, w = size
  projections, scores, values = 2 * 2 * c * c, 3 * (h + w) * c // 2, 2 * (h + w) * c  # For a place.
  return h * w * (projections + scores + values)


def axial_resnet_shape(variant: str, *, stem_width: int = 64) -> AxialResNetShape:
  """The shape that 'AxialR50x1' names. Errors are those of `resnet_shape`."""
  return AxialResNetShape(
    resnet_shape(variant, stem_width=stem_width, prefix=AXIAL_RESNET_PREFIX).stem,
    preactivated=False,
  )
