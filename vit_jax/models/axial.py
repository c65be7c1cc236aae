"""Axial-ViT (arXiv 2010.11929, Appendix D.6): tokens keep their grid, and attend along its rows, then along its columns.

Shapes: b batch, h w patch grid, n = h·w tokens, d width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.axial_variants import axial_shape
from vit_jax.models.positions import refuse_positions, sincos2d
from vit_jax.models.vit import EncoderBlock, Transformer, VisionTransformer


class AxialBlock(EncoderBlock):
  """[b, h, w, d] -> [b, h, w, d]: an encoder block of each row, then one of each column, each with an MLP."""

  @nn.compact
  def __call__(self, x: jax.Array, drop_path: jax.Array, shared: None, train: bool) -> tuple[jax.Array, None]:
    rates = self.dropout, self.drop_paths, self.norm_eps
    # The devices' own kernels are for hundreds of tokens, not for the few of a row.
    block = functools.partial(EncoderBlock, self.mlp, self.heads, 'xla', self.gelu, *rates, self.dtype, self.relative)
    x, _ = block(name='row')(x, drop_path, shared, train)
    x, _ = block(name='column')(x.swapaxes(1, 2), drop_path, shared, train)  # [b, w, h, d]
    return x.swapaxes(1, 2), None


class AxialVisionTransformer(VisionTransformer):
  """As a VisionTransformer, without class token and registers. Attention is not sown: none is over all tokens."""

  def encode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
    """Patches [b, n, d] -> tokens [b, n, d] after the last norm."""
    c, dtype, d = self.config, jnp.dtype(self.config.dtype), self.shape.width
    if c.position == 'sincos2d':
      x = x + sincos2d(grid, d).astype(dtype)
    transformer = Transformer(c, self.shape, grid, dtype, self.gather, AxialBlock, name='Transformer')
    return transformer(x.reshape(-1, *grid, d), None, train).reshape(x.shape)


def axial(config: ModelConfig, classes: int) -> AxialVisionTransformer:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  c = config
  s = axial_shape(c.variant, width=c.width, depth=c.depth, mlp=c.mlp, heads=c.heads)
  refuse_positions(config, s.width)
  if c.pool == 'token':
    raise UserError(f"config.model.pool='token': the grid of {c.variant} has no place for a class token; use gap or map")
  return AxialVisionTransformer(config, s, classes)
