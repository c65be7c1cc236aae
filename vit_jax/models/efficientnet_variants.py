"""Shapes of EfficientNets by name (arXiv 1905.11946).

The table also has Noisy Student's L2 (arXiv 1911.04252) and one EfficientNet-Lite. This module does
not import JAX, so that recipes can read it quickly.
"""

import dataclasses
import math
import re

from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import ceil_divide, conv_taps

EFFICIENTNET_PREFIX = 'EfficientNet-'
# Suffix of variants with PyTorch's padding and epsilon: timm's efficientnet_* without tf_.
TORCH_SUFFIX = '-torch'

# arXiv 1905.11946, Table 1: the stages of B0.
# blocks kernel stride expansion channels
B0_STAGES = (
  (1,    3,     1,     1,        16),
  (2,    3,     2,     6,        24),
  (2,    5,     2,     6,        40),
  (3,    3,     2,     6,        80),
  (3,    5,     1,     6,       112),
  (4,    5,     2,     6,       192),
  (1,    3,     1,     6,       320),
)  # fmt: skip
B0_STEM_CHANNELS, B0_TOP_CHANNELS = 32, 1280

# Factors of width and depth, the published image side, and the published dropout before the head:
# google-research/noisystudent.
# name    width depth  pixels dropout
EFFICIENTNET_SCALES = {
  'B0':    (1.0,  1.0,  224,   0.2),
  'B1':    (1.0,  1.1,  240,   0.2),
  'B2':    (1.1,  1.2,  260,   0.3),
  'B3':    (1.2,  1.4,  300,   0.3),
  'B4':    (1.4,  1.8,  380,   0.4),
  'B5':    (1.6,  2.2,  456,   0.4),
  'B6':    (1.8,  2.6,  528,   0.5),
  'B7':    (2.0,  3.1,  600,   0.5),
  'L2':    (4.3,  5.3,  800,   0.5),
  'Lite0': (1.0,  1.0,  224,   0.2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class MBConvShape:
  """Shape of an inverted bottleneck; kernel size and stride are of its depthwise convolution."""

  in_channels: int
  hidden_channels: int
  out_channels: int
  kernel_size: int
  stride: int


@dataclasses.dataclass(frozen=True, slots=True)
class EfficientNetShape:
  """Shape of an EfficientNet.

  Attributes:
    stem_channels: Channels of the first convolution.
    stages: The blocks of each stage.
    width: Width of the features.
    lite: Use relu6 instead of swish, and no squeeze-and-excite.
    torch: Pad equally on all sides, and normalize with an epsilon of 1e-5, as PyTorch does.
      TensorFlow pads strided convolutions more below and on the right, and its epsilon is 1e-3.
  """

  stem_channels: int
  stages: tuple[tuple[MBConvShape, ...], ...]
  width: int
  lite: bool
  torch: bool = False

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) between two positions of the last feature map."""
    return 32, 32

  @property
  def blocks(self) -> int:
    """Number of blocks in all stages."""
    return sum(map(len, self.stages))

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the last feature map for an image of any `size` in pixels."""
    return ceil_divide(size, 32)

  def flops(self, size: tuple[int, int], channels: int = 3) -> float:
    """Return the FLOPs of a forward pass over one image of `size`, without norms and head.

    A multiply-add counts as 2.
    """
    total = conv_taps(size, 3, 2) * channels * self.stem_channels
    h, w = ceil_divide(size, 2)
    for block in (block for stage in self.stages for block in stage):
      if block.hidden_channels != block.in_channels:
        total += h * w * block.in_channels * block.hidden_channels
      total += conv_taps((h, w), block.kernel_size, block.stride) * block.hidden_channels
      if not self.lite:
        total += 2 * block.hidden_channels * squeeze_channels(block)
      h, w = ceil_divide((h, w), block.stride)
      total += h * w * block.hidden_channels * block.out_channels
    return 2.0 * (total + h * w * self.stages[-1][-1].out_channels * self.width)


def efficientnet_shape(variant: str) -> EfficientNetShape:
  """Return the shape that the name of an EfficientNet stands for.

  'EfficientNet-0.5x0.4' is B0 with factors of 0.5 for the width and 0.4 for the depth.
  'EfficientNet-B0-torch' is B0 with PyTorch's padding and epsilon.

  Raises UserError if the name is not in the table.
  """
  suffixed = variant.removeprefix(EFFICIENTNET_PREFIX)
  name = suffixed.removesuffix(TORCH_SUFFIX)
  factors = re.fullmatch(r'(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)', name)
  if not factors and name not in EFFICIENTNET_SCALES:
    raise UserError(
      f'config.model.variant={variant!r}: there is no EfficientNet {name!r}.'
      f'{did_you_mean(name, EFFICIENTNET_SCALES)}'
    )
  width, depth = map(float, factors.groups()) if factors else EFFICIENTNET_SCALES[name][:2]
  lite = name.startswith('Lite')  # Stem, top and the depths of its first and last stage stay.
  stem = B0_STEM_CHANNELS if lite else round_channels(B0_STEM_CHANNELS, width)
  top = B0_TOP_CHANNELS if lite else round_channels(B0_TOP_CHANNELS, width)
  in_channels, stages = stem, []
  for i, (blocks, kernel_size, stride, expansion, channels) in enumerate(B0_STAGES):
    out_channels, stage = round_channels(channels, width), []
    fixed = lite and i in (0, len(B0_STAGES) - 1)
    for k in range(blocks if fixed else math.ceil(depth * blocks)):
      hidden = in_channels * expansion
      stage.append(MBConvShape(in_channels, hidden, out_channels, kernel_size, 1 if k else stride))
      in_channels = out_channels
    stages.append(tuple(stage))
  return EfficientNetShape(stem, tuple(stages), top, lite, torch=name != suffixed)


def round_channels(channels: int, width: float) -> int:
  """Return channels · width, rounded to a multiple of 8 that is at least 90 % of it."""
  scaled = channels * width
  nearest = max(8, int(scaled + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * scaled else nearest


def squeeze_channels(block: MBConvShape) -> int:
  """Return the number of channels between the squeeze and the excitation of a block."""
  return max(1, block.in_channels // 4)
