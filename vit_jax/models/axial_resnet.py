"""AxialResNet (arXiv 2010.11929, Appendix D.6): BiT's, V1, with attention along rows and columns in place of 3x3 convolutions.

Attention knows relative positions by queries, keys and values (arXiv 2003.07853). What the paper does not say is as in the open
code of its authors' group (scenic, baselines/axial_resnet.py); the other norms are those of our ResNets.
Shapes: b batch, h w places, c channels, n places of a line, g heads.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.config import ModelConfig
from vit_jax.models.axial_variants import HEADS, axial_resnet_shape
from vit_jax.models.resnet import ResNet, Unit, v1
from vit_jax.models.variants import GROUPS

EPSILON = 1e-4  # Of the norms of an attention.


class LineAttention(nn.Module):
  """[b, h, n, c] -> [b, h, n, c]: each of the lines [n, c] attends to itself, and is normalised by itself, before and after.

  With r of the offset from j to i: scores q·k + q·r_k + k·r_q, not divided, and values v + r_v. q and k are half as wide as v.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, c = x.shape[-2:]
    wide = c // HEADS  # Channels of a head's values.
    norm = lambda name: nn.GroupNorm(GROUPS, epsilon=EPSILON, dtype=self.dtype, name=name)
    parts = lambda x: jnp.split(x, [wide // 2, wide], axis=-1)  # Of q, k and v.
    qkv = nn.Dense(2 * c, use_bias=False, dtype=self.dtype, name='qkv')(x.reshape(-1, n, c))
    q, k, v = parts(norm('gn_qkv')(qkv).reshape(-1, n, HEADS, 2 * wide))
    table = self.param('relative', nn.initializers.normal(wide**-0.5), (2 * n - 1, 2 * wide)).astype(self.dtype)
    r_q, r_k, r_v = parts(table[jnp.arange(n)[:, None] - jnp.arange(n) + n - 1])  # [n, n, c/g]
    scores = sum(
      jnp.einsum(what, *of, preferred_element_type=jnp.float32)
      for what, of in {'bigc,bjgc->bgij': (q, k), 'bigc,ijc->bgij': (q, r_k), 'bjgc,ijc->bgij': (k, r_q)}.items()
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    out = jnp.einsum('bgij,bjgc->bigc', weights, v) + jnp.einsum('bgij,ijc->bigc', weights, r_v)
    return norm('gn_out')(out.reshape(-1, n, c)).reshape(x.shape)


class AxialUnit(Unit):
  """A bottleneck of V1 with attention within."""

  def spatial(self, x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h/stride, w/stride, c]: along rows, along columns, and then the mean of 2x2 places to stride."""
    x = LineAttention(self.dtype, name='row')(x)
    x = LineAttention(self.dtype, name='column')(x.swapaxes(1, 2)).swapaxes(1, 2)
    if self.stride == 1:
      return x
    strides = (self.stride, self.stride)
    return nn.avg_pool(x, strides, strides, padding='SAME', count_include_pad=False).astype(self.dtype)


class AxialResNet(ResNet):
  """As a ResNet. Its parameters are for images of one size: there is a vector for each offset within a line."""

  def convolve(self, x: jax.Array) -> jax.Array:
    return v1(self.shape.stem, x, jnp.dtype(self.config.dtype), self.config.remat, AxialUnit)


def axial_resnet(config: ModelConfig, classes: int) -> AxialResNet:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  return AxialResNet(config, axial_resnet_shape(config.variant, stem_width=config.stem_width), classes)
