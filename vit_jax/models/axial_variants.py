"""The shapes of the axial models of arXiv 2010.11929, Appendix D.6, by name: those of plain models, at another cost."""

import dataclasses
import math

from vit_jax.models.variants import ResNetShape, Shape, resnet_shape, shape

VIT = 'AxialViT-'
RESNET = 'Axial'  # Before 'R50x1'.
HEADS = 8  # Of an AxialResNet, each query and key half as wide as a value (scenic, baselines/axial_resnet.py).


@dataclasses.dataclass(frozen=True, slots=True)
class AxialShape(Shape):
  """Of an Axial-ViT, whose blocks are two, along rows and along columns of the grid, and which has no class token."""

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    (h, w), d = self.grid(size), self.width
    projections = 2 * (4 * d * d + 2 * d * self.mlp)  # Multiply-adds for a token: q, k, v, out and the MLP, along either side.
    attention = 2 * (h + w) * d  # For a token: q kᵀ, and the weights times v, with the w of its row and the h of its column.
    embedding = 3 * math.prod(self.patch) * d
    return 2 * h * w * (self.depth * (projections + attention) + embedding)


def axial_shape(variant: str, **numbers: int) -> AxialShape:
  """The shape that 'AxialViT-B/16' names. Numbers and errors are those of `shape`."""
  plain = shape(variant, prefix=VIT, **numbers)
  return AxialShape(plain.width, plain.depth, plain.mlp, plain.heads, plain.patch)


@dataclasses.dataclass(frozen=True, slots=True)
class AxialResNetShape(ResNetShape):
  """Of an AxialResNet, which attends along rows and columns in the place of 3x3 convolutions."""

  def flops(self, size: tuple[int, int]) -> float:
    """Of one forward pass over one image of `size`, a multiply-add counting 2: without norms and head."""
    return 2.0 * self.stem.multiply_adds(size, lambda size, c, stride: attention(size, c))


def attention(size: tuple[int, int], c: int) -> int:
  """Multiply-adds along the rows and the columns of [h, w, c]: q, k and v; three terms of the scores, and two of the values."""
  h, w = size
  projections, scores, values = 2 * 2 * c * c, 3 * (h + w) * c // 2, 2 * (h + w) * c  # For a place.
  return h * w * (projections + scores + values)


def axial_resnet_shape(variant: str, *, stem_width: int = 64) -> AxialResNetShape:
  """The shape that 'AxialR50x1' names. Errors are those of `resnet_shape`."""
  return AxialResNetShape(resnet_shape(variant, stem_width=stem_width, prefix=RESNET).stem, preactivated=False)
