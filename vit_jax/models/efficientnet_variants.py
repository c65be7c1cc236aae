"""The shapes of EfficientNets (arXiv 1905.11946), of Noisy Student's L2 (arXiv 1911.04252) and of a Lite one, by name."""

import dataclasses
import math
import re

from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import conv_taps


@dataclasses.dataclass(frozen=True, slots=True)
class MBConvShape:
  """An inverted bottleneck: channels in, hidden and out, and the side and stride of its depthwise convolution."""

  before: int
  hidden: int
  channels: int
  kernel: int
  stride: int


@dataclasses.dataclass(frozen=True, slots=True)
class EfficientNetShape:
  """Channels of the stem, the blocks of each stage, the width of the features; `lite` without squeeze-excite, with relu6."""

  stem: int
  stages: tuple[tuple[MBConvShape, ...], ...]
  width: int
  lite: bool

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels along (height, width) between two places of the last feature map."""
    return 32, 32

  @property
  def blocks(self) -> int:
    """Of all stages."""
    return sum(map(len, self.stages))

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Places along (height, width) of the last feature map for an image of `size`, which may be any."""
    return -(-size[0] // 32), -(-size[1] // 32)

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    total, (h, w) = conv_taps(size, 3, 2) * 3 * self.stem, (-(-side // 2) for side in size)
    for block in (block for stage in self.stages for block in stage):
      total += h * w * block.before * block.hidden if block.hidden != block.before else 0
      total += conv_taps((h, w), block.kernel, block.stride) * block.hidden
      total += 0 if self.lite else 2 * block.hidden * squeeze_channels(block)
      h, w = -(-h // block.stride), -(-w // block.stride)
      total += h * w * block.hidden * block.channels
    return 2.0 * (total + h * w * self.stages[-1][-1].channels * self.width)


# arXiv 1905.11946, Table 1: the blocks of B0.
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

# Factors of the width and the depth; the published pixels and dropout before the head. google-research/noisystudent.
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
EFFICIENTNET_PREFIX = 'EfficientNet-'


def efficientnet_shape(variant: str) -> EfficientNetShape:
  """The shape that 'EfficientNet-B0', or with factors of one's own 'EfficientNet-0.5x0.4' (width x depth), names.

  UserError for a name that is not in the table.
  """
  name = variant.removeprefix(EFFICIENTNET_PREFIX)
  own = re.fullmatch(r'(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)', name)
  if not own and name not in EFFICIENTNET_SCALES:
    raise UserError(
      f'config.model.variant={variant!r}: there is no EfficientNet {name!r}.{did_you_mean(name, EFFICIENTNET_SCALES)}'
    )
  width, depth = map(float, own.groups()) if own else EFFICIENTNET_SCALES[name][:2]
  lite = name.startswith('Lite')  # Whose ends are not scaled.
  before = stem = B0_STEM_CHANNELS if lite else round_channels(B0_STEM_CHANNELS, width)
  stages = []
  for i, (blocks, kernel, stride, expansion, channels) in enumerate(B0_STAGES):
    after, stage = round_channels(channels, width), []
    fixed = lite and i in (0, len(B0_STAGES) - 1)
    for k in range(blocks if fixed else math.ceil(depth * blocks)):
      stage.append(MBConvShape(before, before * expansion, after, kernel, 1 if k else stride))
      before = after
    stages.append(tuple(stage))
  return EfficientNetShape(
    stem, tuple(stages), B0_TOP_CHANNELS if lite else round_channels(B0_TOP_CHANNELS, width), lite
  )


def round_channels(channels: int, width: float) -> int:
  """Channels times the factor, to the nearest multiple of 8 that takes away no more than a tenth."""
  scaled = channels * width
  nearest = max(8, int(scaled + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * scaled else nearest


def squeeze_channels(block: MBConvShape) -> int:
  """Channels between a block's squeeze and its excitation."""
  return max(1, block.before // 4)
