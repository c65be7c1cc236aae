"""Shapes of Vision Transformers, ResNets and their axial versions, by the names in the papers.

This module does not import JAX, so that recipes can read it quickly.

Sizes are (height, width). All FLOPs are of one forward pass over one image, without norms and head;
a multiply-add counts as 2, as in the papers.

Shapes: h w patch grid or feature map, n tokens, d width, c channels.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from vit_jax.errors import UserError, did_you_mean

NORM_GROUPS = 32  # Groups of every GroupNorm in a ResNet.
AXIAL_VIT_PREFIX = 'AxialViT-'  # As in AxialViT-B/16.
AXIAL_RESNET_PREFIX = 'Axial'  # As in AxialR50x1.
# Heads of an AxialResNet, whose queries and keys are half as wide as its values: scenic,
# baselines/axial_resnet.py.
AXIAL_RESNET_HEADS = 8

# Ti, S: arXiv 2106.10270. B, L, H: arXiv 2010.11929, Table 1. s, g, G: arXiv 2106.04560.
# The others: big_vision, models/vit.py.
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


# Hybrids: arXiv 2010.11929 §4.1 and the released code. The number after the slash is the total
# stride, not a patch. R50+B/16 has the blocks of the fourth stage in its third. R+Ti/16 has a
# stride of 32, despite its name.
# name   stride  blocks        patch on their output
HYBRID_BACKBONES = {
  ('R50', '16'): ((3, 4, 9),    1),
  ('R50', '32'): ((3, 4, 6, 3), 1),
  ('R26', '32'): ((2, 2, 2, 2), 1),
  ('R',   '16'): ((),           8),
}  # fmt: skip

# Blocks per stage: arXiv 1912.11370 and its code.
RESNET_VARIANTS = {
  'R26':  (2, 2, 2, 2),
  'R50':  (3, 4, 6, 3),
  'R101': (3, 4, 23, 3),
  'R152': (3, 8, 36, 3),
  'R200': (3, 24, 36, 3),
}  # fmt: skip


def vit_shape(
  variant: str,
  *,
  width: int = 0,
  depth: int = 0,
  mlp: int = 0,
  heads: int = 0,
  stem_width: int = 64,
  swiglu: bool = False,
  prefix: str = '',
) -> 'ViTShape':
  """Return the shape that the name of a Vision Transformer or hybrid stands for.

  Args:
    variant: 'B/16' has patches of 16x16, 'B/16x8' of 16 high and 8 wide. 'R50+B/16' is a hybrid.
      'R2.1+B/16' is a hybrid whose ResNet has stages of 2 and 1 blocks.
    width: Replaces the table's number, as do `depth`, `mlp` and `heads`. 0 keeps the table's.
    depth: Number of blocks.
    mlp: Hidden width of the MLP.
    heads: Attention heads.
    stem_width: Channels of a hybrid's first convolution.
    swiglu: Whether the MLP is gated.
    prefix: Part of `variant` before the name, to be removed.

  Raises UserError if the name is not in the tables, the patch is not a number, or the heads do not
  divide the width.
  """
  name, _, patch = variant.removeprefix(prefix).partition('/')
  resnet, plus, name = name.rpartition('+')
  if name not in VIT_VARIANTS:
    raise UserError(
      f'config.model.variant={variant!r}: there is no variant {name!r}.'
      f'{did_you_mean(name, VIT_VARIANTS)}'
    )
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', patch):
    raise UserError(
      f"config.model.variant={variant!r}: expected NAME/PATCH with the patch's side in pixels, "
      f'such as {prefix}{name}/16'
    )
  numbers = zip((width, depth, mlp, heads), VIT_VARIANTS[name], strict=True)
  width, depth, mlp, heads = (given or default for given, default in numbers)
  if width % heads:
    raise UserError(f'config.model: a width of {width} does not divide into {heads} heads')
  if plus:
    check_stem_width(stem_width)
    backbone, side = _hybrid_backbone(variant, resnet, patch, stem_width)
    return ViTShape(width, depth, mlp, heads, (side, side), backbone, swiglu)
  high, _, wide = patch.partition('x')
  patch_sides = int(high), int(wide or high)
  return ViTShape(width, depth, mlp, heads, patch_sides, swiglu=swiglu)


def _hybrid_backbone(
  variant: str, resnet: str, stride: str, stem_width: int
) -> tuple['ResNetBackbone', int]:
  """Return the ResNet of a hybrid, and the side of a patch on its output."""
  if (resnet, stride) in HYBRID_BACKBONES:
    blocks_per_stage, patch = HYBRID_BACKBONES[resnet, stride]
    return ResNetBackbone(blocks_per_stage, stem_width), patch
  if re.fullmatch(r'R[1-9]\d*(\.[1-9]\d*)+', resnet) and stride.isdigit():
    backbone = ResNetBackbone(tuple(map(int, resnet[1:].split('.'))), stem_width)
    if int(stride) % backbone.stride == 0:
      return backbone, int(stride) // backbone.stride
    raise UserError(
      f'config.model.variant={variant!r}: a stride of {stride} is not a multiple of the '
      f'{backbone.stride} of {resnet}'
    )
  known = ', '.join(f'{name}+…/{total}' for name, total in HYBRID_BACKBONES)
  raise UserError(
    f'config.model.variant={variant!r}: the hybrids are {known}, or R3.4.9+…/16 with the number of '
    'blocks of each stage'
  )


@dataclasses.dataclass(frozen=True, slots=True)
class ViTShape:
  """Shape of a Vision Transformer or hybrid.

  Attributes:
    width: Width d of a token.
    depth: Number of blocks.
    mlp: Hidden width of the MLP.
    heads: Attention heads.
    patch: (height, width) of a patch, in pixels or in positions of the backbone's output.
    backbone: The ResNet of a hybrid.
    swiglu: Whether the MLP is gated, and has three linear layers instead of two.
    extra_tokens: Tokens besides the patches. The papers count one, the class token.
  """

  width: int
  depth: int
  mlp: int
  heads: int
  patch: tuple[int, int]
  backbone: 'ResNetBackbone | None' = None
  swiglu: bool = False
  extra_tokens: int = 1

  @property
  def mlp_products(self) -> int:
    """Multiply-adds of the MLP per token."""
    return (3 if self.swiglu else 2) * self.width * self.mlp

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) between two tokens."""
    step = self.backbone.stride if self.backbone else 1
    return self.patch[0] * step, self.patch[1] * step

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (h, w) of an image of `size`.

    Raises UserError if the patches do not divide the image.
    """
    high, wide = self.stride
    if size[0] % high or size[1] % wide:
      raise UserError(
        f'an image of {size[0]}x{size[1]} does not divide into patches of {high}x{wide}: '
        'choose --config.data.size or the patch in --config.model.variant'
      )
    return size[0] // high, size[1] // wide

  def flops(self, size: tuple[int, int], channels: int = 3) -> float:
    """Return the FLOPs of a forward pass over one image of `size`."""
    patches, d = math.prod(self.grid(size)), self.width
    n = patches + self.extra_tokens
    # Multiply-adds per token: q, k, v, out and the MLP.
    projections = 4 * d * d + self.mlp_products
    attention = 2 * n * d  # Multiply-adds per token: q kᵀ, and the weights times v.
    embedded = self.backbone.out_channels if self.backbone else channels
    embedding = patches * embedded * math.prod(self.patch) * d
    backbone = self.backbone.multiply_adds(size, channels) if self.backbone else 0
    return 2 * (n * self.depth * (projections + attention) + embedding + backbone)


def resnet_shape(variant: str, *, stem_width: int = 64, prefix: str = '') -> 'ResNetShape':
  """Return the shape that the name of a ResNet stands for.

  Args:
    variant: 'R50x1' is V1, 'BiT-R50x1' is V2. The number after the x multiplies all channels.
      'R1.2x1' has two stages, of 1 and 2 blocks.
    stem_width: Channels of the first convolution, before they are multiplied.
    prefix: Part of `variant` before the name, to be removed.

  Raises UserError if the depth is not in the table, or the groups of the norms do not divide
  `stem_width`.
  """
  bit, name, factor = re.fullmatch(r'(BiT-)?(R[\d.]+)x(\d+)', variant.removeprefix(prefix)).groups()
  if name in RESNET_VARIANTS:
    blocks_per_stage = RESNET_VARIANTS[name]
  elif '.' in name:
    blocks_per_stage = tuple(map(int, name[1:].split('.')))
  else:
    raise UserError(
      f'config.model.variant={variant!r}: there is no ResNet {name!r}.'
      f'{did_you_mean(name, RESNET_VARIANTS)}'
    )
  check_stem_width(stem_width)
  backbone = ResNetBackbone(blocks_per_stage, stem_width * int(factor))
  return ResNetShape(backbone, preactivated=bool(bit))


def check_stem_width(stem_width: int):
  """Raise UserError if the groups of a ResNet's norms do not divide the channels of its stem."""
  if stem_width % NORM_GROUPS:
    raise UserError(
      f'config.model.stem_width={stem_width}: expected a multiple of {NORM_GROUPS}, the number of '
      'groups of its norms'
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetShape:
  """Shape of a ResNet.

  Attributes:
    backbone: Its convolutions.
    preactivated: True for V2, whose activations come before the convolutions, as published. False
      for V1.
  """

  backbone: 'ResNetBackbone'
  preactivated: bool

  @property
  def width(self) -> int:
    """Width of the features."""
    return self.backbone.out_channels

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) between two positions of the last feature map."""
    return self.backbone.stride, self.backbone.stride

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the last feature map for an image of any `size`."""
    return ceil_divide(size, self.backbone.stride)

  def flops(self, size: tuple[int, int], channels: int = 3) -> float:
    """Return the FLOPs of a forward pass over one image of `size`."""
    return 2.0 * self.backbone.multiply_adds(size, channels)


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetBackbone:
  """The convolutions of a ResNet.

  Attributes:
    blocks_per_stage: Number of bottlenecks in each stage; empty for a root alone.
    width: Channels of the first convolution.
  """

  blocks_per_stage: tuple[int, ...]
  width: int

  @property
  def stride(self) -> int:
    """Pixels between two positions of the output: 4 for the root, doubled by each later stage."""
    return 4 * 2 ** max(0, len(self.blocks_per_stage) - 1)

  @property
  def out_channels(self) -> int:
    """Channels of the output."""
    stages = len(self.blocks_per_stage)
    return self.width * 4 * 2 ** (stages - 1) if stages else self.width

  def multiply_adds(
    self,
    size: tuple[int, int],
    channels: int = 3,
    spatial_multiply_adds: Callable[[tuple[int, int], int, int], int] | None = None,
  ) -> int:
    """Return the multiply-adds of all layers over an image of `size`.

    `spatial_multiply_adds(size, channels, stride)` counts the second layer of a bottleneck. The
    default is a 3x3 convolution.
    """
    spatial_multiply_adds = spatial_multiply_adds or conv3x3_multiply_adds
    total = conv_taps(size, 7, 2) * channels * self.width
    (h, w), in_channels = ceil_divide(size, 4), self.width
    for stage, blocks in enumerate(self.blocks_per_stage):
      c = self.width * 2**stage
      for block in range(blocks):
        stride = 2 if stage and not block else 1  # Of the second layer.
        total += h * w * in_channels * c + spatial_multiply_adds((h, w), c, stride)
        h, w = ceil_divide((h, w), stride)
        projected = 0 if block else in_channels  # The first block projects its shortcut.
        total += h * w * 4 * c * (c + projected)
        in_channels = 4 * c
    return total


def conv3x3_multiply_adds(size: tuple[int, int], c: int, stride: int) -> int:
  """Return the multiply-adds of a strided 3x3 convolution from c to c channels over `size`."""
  return conv_taps(size, 3, stride) * c * c


def conv_taps(size: tuple[int, int], kernel_size: int, stride: int) -> int:
  """Return the multiply-adds of a strided convolution over one channel, without the padding.

  XLA counts in this way. Table 6 of arXiv 2010.11929 must also have been counted in this way: all
  its ResNets agree within 2 %, but only within 4 % if products with padding count.
  """
  total = 1
  for side in size:
    positions = -(-side // stride)
    before = max((positions - 1) * stride + kernel_size - side, 0) // 2
    starts = range(-before, positions * stride - before, stride)
    total *= sum(min(side, start + kernel_size) - max(0, start) for start in starts)
  return total


def ceil_divide(size: tuple[int, int], divisor: int) -> tuple[int, int]:
  """Return `size` divided by `divisor`, rounded up."""
  return -(-size[0] // divisor), -(-size[1] // divisor)


def axial_vit_shape(variant: str, *, swiglu: bool = False, **numbers: int) -> 'AxialViTShape':
  """Return the shape that the name of an Axial-ViT stands for, such as 'AxialViT-B/16'.

  Numbers and errors are those of `vit_shape`.
  """
  s = vit_shape(variant, prefix=AXIAL_VIT_PREFIX, swiglu=swiglu, **numbers)
  return AxialViTShape(s.width, s.depth, s.mlp, s.heads, s.patch, swiglu=swiglu)


@dataclasses.dataclass(frozen=True, slots=True)
class AxialViTShape(ViTShape):
  """Shape of an Axial-ViT.

  Each of its blocks is two blocks, one along rows and one along columns. It has no class token.
  """

  def flops(self, size: tuple[int, int], channels: int = 3) -> float:
    """Return the FLOPs of a forward pass over one image of `size`."""
    (h, w), d = self.grid(size), self.width
    # Multiply-adds per token and along both axes: q, k, v, out and the MLP.
    projections = 2 * (4 * d * d + self.mlp_products)
    # q kᵀ, and the weights times v, with the w tokens of the row and the h tokens of the column.
    attention = 2 * (h + w) * d
    embedding = channels * math.prod(self.patch) * d
    return 2 * h * w * (self.depth * (projections + attention) + embedding)


def axial_resnet_shape(variant: str, *, stem_width: int = 64) -> 'AxialResNetShape':
  """Return the shape that the name of an AxialResNet stands for, such as 'AxialR50x1'.

  Errors are those of `resnet_shape`.
  """
  plain = resnet_shape(variant, stem_width=stem_width, prefix=AXIAL_RESNET_PREFIX)
  return AxialResNetShape(plain.backbone, preactivated=False)


@dataclasses.dataclass(frozen=True, slots=True)
class AxialResNetShape(ResNetShape):
  """Shape of an AxialResNet, a V1 ResNet with axial attention in place of 3x3 convolutions."""

  def flops(self, size: tuple[int, int], channels: int = 3) -> float:
    """Return the FLOPs of a forward pass over one image of `size`."""
    return 2.0 * self.backbone.multiply_adds(size, channels, axial_attention_multiply_adds)


def axial_attention_multiply_adds(size: tuple[int, int], c: int, stride: int) -> int:
  """Return the multiply-adds of attention along the rows and columns of [h, w, c].

  The stride comes after the attention, so it changes nothing.
  """
  del stride
  h, w = size
  projections = 2 * 2 * c * c  # Per position and along both axes: q, k and v.
  scores = 3 * (h + w) * c // 2  # Three terms.
  values = 2 * (h + w) * c  # Two terms.
  return h * w * (projections + scores + values)
