"""Axial-ViT (arXiv 2010.11929, Appendix D.6): tokens keep their grid, and attend along its rows, then along its columns.

Shapes: b batch, h w patch grid, n = h·w tokens, d width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.layers import sincos2d_embedding
from vit_jax.models.resnet import Bottleneck, ResNet, resnet_v1
from vit_jax.models.variants import (
  AXIAL_RESNET_HEADS,
  NORM_GROUPS,
  axial_resnet_shape,
  axial_vit_shape,
)
from vit_jax.models.vit import EncoderBlock, Transformer, VisionTransformer, check_positions


class AxialBlock(EncoderBlock):
  """[b, h, w, d] -> [b, h, w, d]: an encoder block of each row, then one of each column, each with an MLP."""

  @nn.compact
  def __call__(
    self, x: jax.Array, drop_path: jax.Array, shared: None, train: bool
  ) -> tuple[jax.Array, None]:
    rates = self.dropout, self.drop_paths, self.norm_eps
    # The devices' own kernels are for hundreds of tokens, not for the few of a row.
    block = functools.partial(
      EncoderBlock, self.mlp, self.heads, 'xla', self.gelu, *rates, self.dtype, self.relative
    )
    x, _ = block(name='row')(x, drop_path, shared, train)
    x, _ = block(name='column')(x.swapaxes(1, 2), drop_path, shared, train)  # [b, w, h, d]
    return x.swapaxes(1, 2), None


class AxialVisionTransformer(VisionTransformer):
  """As a VisionTransformer, without class token and registers. Attention is not sown: none is over all tokens."""

  def encode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
    """Patches [b, n, d] -> tokens [b, n, d] after the last norm."""
    c, dtype, d = self.config, jnp.dtype(self.config.dtype), self.shape.width
    if c.position == 'sincos2d':
      x = x + sincos2d_embedding(grid, d).astype(dtype)
    transformer = Transformer(
      c, self.shape, grid, dtype, self.gather, AxialBlock, name='Transformer'
    )
    return transformer(x.reshape(-1, *grid, d), None, train).reshape(x.shape)


def build_axial_vit(config: ModelConfig, classes: int) -> AxialVisionTransformer:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  c = config
  s = axial_vit_shape(c.variant, width=c.width, depth=c.depth, mlp=c.mlp, heads=c.heads)
  check_positions(config, s.width)
  if c.pool == 'token':
    raise UserError(
      f"config.model.pool='token': the grid of {c.variant} has no place for a class token; use gap or map"
    )
  return AxialVisionTransformer(config, s, classes)


ATTENTION_NORM_EPSILON = 1e-4  # Of the norms of an attention.


class LineAttention(nn.Module):
  """[b, h, n, c] -> [b, h, n, c]: each of the lines [n, c] attends to itself, and is normalised by itself, before and after.

  With r of the offset from j to i: scores q·k + q·r_k + k·r_q, not divided, and values v + r_v. q and k are half as wide as v.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, c = x.shape[-2:]
    wide = c // AXIAL_RESNET_HEADS  # Channels of a head's values.
    norm = lambda name: nn.GroupNorm(
      NORM_GROUPS, epsilon=ATTENTION_NORM_EPSILON, dtype=self.dtype, name=name
    )
    parts = lambda x: jnp.split(x, [wide // 2, wide], axis=-1)  # Of q, k and v.
    qkv = nn.Dense(2 * c, use_bias=False, dtype=self.dtype, name='qkv')(x.reshape(-1, n, c))
    q, k, v = parts(norm('gn_qkv')(qkv).reshape(-1, n, AXIAL_RESNET_HEADS, 2 * wide))
    table = self.param(
      'relative', nn.initializers.normal(wide**-0.5), (2 * n - 1, 2 * wide)
    ).astype(self.dtype)
    r_q, r_k, r_v = parts(table[jnp.arange(n)[:, None] - jnp.arange(n) + n - 1])  # [n, n, c/g]
    scores = sum(
      jnp.einsum(what, *of, preferred_element_type=jnp.float32)
      for what, of in {
        'bigc,bjgc->bgij': (q, k),
        'bigc,ijc->bgij': (q, r_k),
        'bjgc,ijc->bgij': (k, r_q),
      }.items()
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    out = jnp.einsum('bgij,bjgc->bigc', weights, v) + jnp.einsum('bgij,ijc->bigc', weights, r_v)
    return norm('gn_out')(out.reshape(-1, n, c)).reshape(x.shape)


class AxialBottleneck(Bottleneck):
  """A bottleneck of V1 with attention within."""

  def spatial(self, x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h/stride, w/stride, c]: along rows, along columns, and then the mean of 2x2 places to stride."""
    x = LineAttention(self.dtype, name='row')(x)
    x = LineAttention(self.dtype, name='column')(x.swapaxes(1, 2)).swapaxes(1, 2)
    if self.stride == 1:
      return x
    strides = (self.stride, self.stride)
    return nn.avg_pool(x, strides, strides, padding='SAME', count_include_pad=False).astype(
      self.dtype
    )


class AxialResNet(ResNet):
  """As a ResNet. Its parameters are for images of one size: there is a vector for each offset within a line."""

  def convolve(self, x: jax.Array) -> jax.Array:
    return resnet_v1(
      self.shape.stem, x, jnp.dtype(self.config.dtype), self.config.remat, AxialBottleneck
    )


def build_axial_resnet(config: ModelConfig, classes: int) -> AxialResNet:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  return AxialResNet(
    config, axial_resnet_shape(config.variant, stem_width=config.stem_width), classes
  )
