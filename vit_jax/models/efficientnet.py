"""EfficientNet (arXiv 1905.11946), which Noisy Student trains (arXiv 1911.04252).

Shapes: b batch, h w places, c channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.efficientnet_variants import (
  EfficientNetShape,
  MBConvShape,
  efficientnet_shape,
  squeeze_channels,
)
from vit_jax.models.layers import BatchNorm, Dropout, apply_drop_path, apply_head, normalize_images

fan_out_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Of a depthwise kernel [p, p, 1, c], each of whose channels is a filter by itself.
depthwise_init = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')

# What the backward pass computes again: nothing, or each block.
EFFICIENTNET_REMAT = {
  'none': lambda block: block,
  'full': functools.partial(nn.remat, static_argnums=(2,)),
}


class MBConv(nn.Module):
  """An inverted bottleneck [b, h, w, c] -> [b, h/stride, w/stride, c']: 1x1 wide, depthwise, squeeze and excite, 1x1 narrow.

  With a shortcut, where the shapes allow, past a branch that is dropped for whole images at `drop_path`.
  """

  shape: MBConvShape
  lite: bool
  drop_path: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    s, shortcut = self.shape, x
    act = nn.relu6 if self.lite else nn.swish
    conv = functools.partial(nn.Conv, dtype=self.dtype, kernel_init=fan_out_init)
    norm = lambda name, x: BatchNorm(self.dtype, name=name)(x, train)
    if s.hidden != s.before:
      x = act(norm('expand_norm', conv(s.hidden, (1, 1), use_bias=False, name='expand')(x)))
    per_channel = {
      'feature_group_count': s.hidden,
      'use_bias': False,
      'kernel_init': depthwise_init,
    }
    x = conv(s.hidden, (s.kernel, s.kernel), (s.stride, s.stride), **per_channel, name='depthwise')(
      x
    )
    x = act(norm('depthwise_norm', x))
    if not self.lite:
      gate = x.mean(axis=(1, 2), keepdims=True)
      gate = act(conv(squeeze_channels(s), (1, 1), name='squeeze')(gate))
      x = x * nn.sigmoid(conv(s.hidden, (1, 1), name='excite')(gate))
    x = norm('project_norm', conv(s.channels, (1, 1), use_bias=False, name='project')(x))
    if x.shape != shortcut.shape:
      return x
    x = (
      apply_drop_path(x, self.make_rng('dropout'), self.drop_path)
      if train and self.drop_path
      else x
    )
    return shortcut + x


class EfficientNetStage(nn.Module):
  """Blocks one after another."""

  blocks: tuple[MBConvShape, ...]
  drop_paths: tuple[float, ...]
  lite: bool
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    block = EFFICIENTNET_REMAT[self.remat](MBConv)
    for i, (shape, drop_path) in enumerate(zip(self.blocks, self.drop_paths, strict=True)):
      x = block(shape, self.lite, drop_path, self.dtype, name=f'unit{i + 1}')(x, train)
    return x


class EfficientNet(nn.Module):
  """uint8 images [b, H, W, 3] -> float32 logits [b, k]; without classes (0) the features [b, d], which it also sows."""

  config: ModelConfig
  shape: EfficientNetShape
  classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    c, s, dtype = self.config, self.shape, jnp.dtype(self.config.dtype)
    act = nn.relu6 if s.lite else nn.swish
    conv = functools.partial(nn.Conv, dtype=dtype, kernel_init=fan_out_init, use_bias=False)
    norm = lambda name, x: BatchNorm(dtype, name=name)(x, train)
    x = act(
      norm('stem_norm', conv(s.stem, (3, 3), (2, 2), name='stem_conv')(normalize_images(images, c)))
    )
    # Of the last block as much as is asked for, and linearly less before (arXiv 1603.09382).
    rates = iter(c.drop_path * i / max(1, s.blocks - 1) for i in range(s.blocks))
    for i, blocks in enumerate(s.stages):
      x = EfficientNetStage(
        blocks, tuple(next(rates) for _ in blocks), s.lite, c.remat, dtype, name=f'block{i + 1}'
      )(x, train)
    x = act(norm('top_norm', conv(s.width, (1, 1), name='top_conv')(x)))
    x = x.mean(axis=(1, 2))  # [b, d]
    self.sow('features', 'features', x)
    x = Dropout(c.dropout, deterministic=not train)(x)
    return x if not self.classes else apply_head(x, self.classes, c)


def build_efficientnet(config: ModelConfig, classes: int) -> EfficientNet:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  return EfficientNet(config, efficientnet_shape(config.variant), classes)
