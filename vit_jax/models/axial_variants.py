"""The shapes of the axial models of arXiv 2010.11929, Appendix D.6, by name: those of plain models, at another cost."""

import dataclasses
import math

from vit_jax.models.variants import Shape, shape

VIT = 'AxialViT-'


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
