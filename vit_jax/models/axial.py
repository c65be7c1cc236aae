"""Axial-ViT and AxialResNet (arXiv 2010.11929, Appendix D.6): attention along rows, then columns.

An Axial-ViT keeps its tokens on their grid. An AxialResNet has axial attention in place of the 3x3
convolutions of a ResNet.

Shapes: b batch, h w patch grid or feature map, n length of a row or column, d width, c channels,
g heads.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.positions import check_positions, sincos2d_embedding
from vit_jax.models.resnet import Bottleneck, ResNet, resnet_v1
from vit_jax.models.variants import (
  AXIAL_RESNET_HEADS,
  NORM_GROUPS,
  axial_resnet_shape,
  axial_vit_shape,
)
from vit_jax.models.vit import EncoderBlock, Transformer, VisionTransformer

ATTENTION_NORM_EPSILON = 1e-4  # Of the norms inside LineAttention.


def build_axial_vit(config: ModelConfig, classes: int) -> 'AxialVisionTransformer':
  """Build the Axial-ViT that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown, its numbers do not fit together, or the pooling needs
  a class token.
  """
  c = config
  numbers = {'width': c.width, 'depth': c.depth, 'mlp': c.mlp, 'heads': c.heads}
  shape = axial_vit_shape(c.variant, **numbers, swiglu=c.swiglu)
  check_positions(config, shape)
  if c.has_rope or c.position == 'relative2d':
    raise UserError(
      f'config.model.position={c.position!r}: {c.variant} attends along one axis at a time'
    )
  if c.pool == 'token':
    raise UserError(
      f"config.model.pool='token': the grid of {c.variant} has no place for a class token; "
      'use gap or map'
    )
  return AxialVisionTransformer(config, shape, classes)


class AxialVisionTransformer(VisionTransformer):
  """Vision Transformer with axial attention, without class token and registers.

  It does not sow 'attention', because no attention map is over all tokens.
  """

  def encode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
    """Encode patches [b, h·w, d] into tokens [b, h·w, d] after the final norm."""
    c, d, dtype = self.config, self.shape.width, jnp.dtype(self.config.dtype)
    if c.position == 'sincos2d':
      x = x + sincos2d_embedding(grid, d).astype(dtype)
    transformer = Transformer(
      c, self.shape, grid, dtype, self.gather, AxialBlock, name='Transformer'
    )
    return transformer(x.reshape(-1, *grid, d), None, train).reshape(x.shape)


class AxialBlock(EncoderBlock):
  """Two encoder blocks for tokens [b, h, w, d]: one within each row, one within each column."""

  @nn.compact
  def __call__(
    self, x: jax.Array, drop_path: jax.Array, shared: None, train: bool
  ) -> tuple[jax.Array, None]:
    # Fused attention kernels are for hundreds of tokens, not for the few of a row: use XLA.
    config = dataclasses.replace(self.config, attention='xla')
    block = functools.partial(
      EncoderBlock, config, self.shape, make_score_bias=self.make_score_bias
    )
    x, _ = block(name='row')(x, drop_path, shared, train)
    x, _ = block(name='column')(x.swapaxes(1, 2), drop_path, shared, train)  # [b, w, h, d]
    return x.swapaxes(1, 2), None


def build_axial_resnet(config: ModelConfig, classes: int) -> 'AxialResNet':
  """Build the AxialResNet that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown or its numbers do not fit together.
  """
  shape = axial_resnet_shape(config.variant, stem_width=config.stem_width)
  return AxialResNet(config, shape, classes)


class AxialResNet(ResNet):
  """ResNet with axial attention in place of 3x3 convolutions.

  Its parameters fit images of one size, since each offset within a line has its own vector.
  """

  def forward_features(self, x: jax.Array) -> jax.Array:
    """Return the last feature map [b, h, w, d] of normalized images [b, H, W, 3]."""
    c = self.config
    return resnet_v1(self.shape.backbone, x, jnp.dtype(c.dtype), c.remat, AxialBottleneck)


class AxialBottleneck(Bottleneck):
  """V1 bottleneck with axial attention as its spatial layer."""

  def spatial(self, x: jax.Array) -> jax.Array:
    """Attend along rows and columns, then average to stride: [b, h, w, c] -> [b, h/s, w/s, c].

    The stride s averages s x s positions; at an odd edge, the mean is over those inside the map.
    """
    x = LineAttention(self.dtype, name='row')(x)
    x = LineAttention(self.dtype, name='column')(x.swapaxes(1, 2)).swapaxes(1, 2)
    if self.stride == 1:
      return x
    strides = (self.stride, self.stride)
    x = nn.avg_pool(x, strides, strides, padding='SAME', count_include_pad=False)
    return x.astype(self.dtype)


class LineAttention(nn.Module):
  """Self-attention within each line [n, c] of [b, h, n, c], with a GroupNorm before and after.

  Each offset from a key to a query has learned vectors r_q, r_k and r_v. The score is
  q·k + q·r_k + k·r_q, without division by √c, and the value is v + r_v. Queries and keys are half
  as wide as values. The norms use the statistics of a single line.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, c = x.shape[-2:]
    g = AXIAL_RESNET_HEADS
    value_width = c // g
    norm = functools.partial(
      nn.GroupNorm, NORM_GROUPS, epsilon=ATTENTION_NORM_EPSILON, dtype=self.dtype
    )
    split = functools.partial(
      jnp.split, indices_or_sections=[value_width // 2, value_width], axis=-1
    )
    qkv = nn.Dense(2 * c, use_bias=False, dtype=self.dtype, name='qkv')(x.reshape(-1, n, c))
    q, k, v = split(norm(name='gn_qkv')(qkv).reshape(-1, n, g, 2 * value_width))
    init = nn.initializers.normal(value_width**-0.5)
    table = self.param('relative', init, (2 * n - 1, 2 * value_width)).astype(self.dtype)
    r_q, r_k, r_v = split(table[jnp.arange(n)[:, None] - jnp.arange(n) + n - 1])  # [n, n, c/g]
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = einsum('bigc,bjgc->bgij', q, k)
    scores = scores + einsum('bigc,ijc->bgij', q, r_k) + einsum('bjgc,ijc->bgij', k, r_q)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    out = jnp.einsum('bgij,bjgc->bigc', weights, v) + jnp.einsum('bgij,ijc->bigc', weights, r_v)
    return norm(name='gn_out')(out.reshape(-1, n, c)).reshape(x.shape)
