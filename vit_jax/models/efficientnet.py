"""EfficientNet (arXiv 1905.11946), the network that Noisy Student trains (arXiv 1911.04252).

Shapes: b batch, H W image, h w feature map, c channels, d width of the features, k classes.
"""

import functools
import itertools

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
from vit_jax.models.layers import (
  BATCH_NORM_EPSILON,
  BatchNorm,
  Dropout,
  apply_drop_path,
  apply_head,
  normalize_images,
)

fan_out_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# A depthwise kernel is [p, p, 1, c]: each channel has its own p x p filter.
depthwise_init = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')

# How much the backward pass recomputes: nothing, or the inside of every block.
EFFICIENTNET_REMAT = {
  'none': lambda block_cls: block_cls,
  'full': functools.partial(nn.remat, static_argnums=(2,)),
}
TORCH_NORM_EPSILON = 1e-5  # PyTorch's default.


class MBConv(nn.Module):
  """Inverted bottleneck, [b, h, w, c] -> [b, h/stride, w/stride, c'].

  The layers are a 1x1 expansion, a depthwise convolution, squeeze-and-excite and a 1x1 projection.
  If input and output have the same shape, there is a shortcut. In training, the branch beside the
  shortcut is dropped for a fraction `drop_path` of the images.
  """

  shape: MBConvShape
  lite: bool
  drop_path: float
  dtype: jnp.dtype
  torch: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    s, shortcut = self.shape, x
    act = nn.relu6 if self.lite else nn.swish
    conv = functools.partial(nn.Conv, dtype=self.dtype, kernel_init=fan_out_init)
    epsilon = norm_epsilon(self.torch)
    norm = lambda name, x: BatchNorm(self.dtype, epsilon, name=name)(x, train)
    if s.hidden_channels != s.in_channels:
      x = conv(s.hidden_channels, (1, 1), use_bias=False, name='expand')(x)
      x = act(norm('expand_norm', x))
    x = conv(
      s.hidden_channels,
      (s.kernel_size, s.kernel_size),
      (s.stride, s.stride),
      padding=strided_padding(s.kernel_size, self.torch),
      feature_group_count=s.hidden_channels,
      use_bias=False,
      kernel_init=depthwise_init,
      name='depthwise',
    )(x)
    x = act(norm('depthwise_norm', x))
    if not self.lite:
      gate = x.mean(axis=(1, 2), keepdims=True)  # [b, 1, 1, hidden]
      gate = act(conv(squeeze_channels(s), (1, 1), name='squeeze')(gate))
      x = x * nn.sigmoid(conv(s.hidden_channels, (1, 1), name='excite')(gate))
    x = norm('project_norm', conv(s.out_channels, (1, 1), use_bias=False, name='project')(x))
    if x.shape != shortcut.shape:
      return x
    if train and self.drop_path:
      x = apply_drop_path(x, self.make_rng('dropout'), self.drop_path)
    return shortcut + x


class EfficientNetStage(nn.Module):
  """Sequence of blocks, each with its own shape and drop rate."""

  blocks: tuple[MBConvShape, ...]
  drop_path_rates: tuple[float, ...]
  lite: bool
  remat: str
  dtype: jnp.dtype
  torch: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    block_cls = EFFICIENTNET_REMAT[self.remat](MBConv)
    for i, (shape, rate) in enumerate(zip(self.blocks, self.drop_path_rates, strict=True)):
      block = block_cls(shape, self.lite, rate, self.dtype, self.torch, name=f'unit{i + 1}')
      x = block(x, train)
    return x


class EfficientNet(nn.Module):
  """EfficientNet from uint8 images [b, H, W, 3] to float32 logits [b, k].

  With `classes` of 0 it has no head and returns the features [b, d]. It also sows them as
  'features', before dropout.
  """

  config: ModelConfig
  shape: EfficientNetShape
  classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    c, s, dtype = self.config, self.shape, jnp.dtype(self.config.dtype)
    act = nn.relu6 if s.lite else nn.swish
    conv = functools.partial(nn.Conv, dtype=dtype, kernel_init=fan_out_init, use_bias=False)
    norm = lambda name, x: BatchNorm(dtype, norm_epsilon(s.torch), name=name)(x, train)
    stem = conv(
      s.stem_channels, (3, 3), (2, 2), padding=strided_padding(3, s.torch), name='stem_conv'
    )
    x = act(norm('stem_norm', stem(normalize_images(images, c))))
    # Drop rates grow linearly from 0 to `drop_path` at the last block (arXiv 1603.09382).
    rates = iter(c.drop_path * i / max(1, s.blocks - 1) for i in range(s.blocks))
    for i, blocks in enumerate(s.stages):
      stage_rates = tuple(itertools.islice(rates, len(blocks)))
      stage = EfficientNetStage(
        blocks, stage_rates, s.lite, c.remat, dtype, s.torch, name=f'block{i + 1}'
      )
      x = stage(x, train)
    x = act(norm('top_norm', conv(s.width, (1, 1), name='top_conv')(x)))
    x = x.mean(axis=(1, 2))  # [b, d]
    self.sow('features', 'features', x)
    x = Dropout(c.dropout, deterministic=not train)(x)
    return apply_head(x, self.classes, c) if self.classes else x


def strided_padding(kernel_size: int, torch: bool) -> str | int:
  """Return the padding of a convolution with an odd kernel: PyTorch's or TensorFlow's.

  They agree with a stride of 1.
  """
  return kernel_size // 2 if torch else 'SAME'


def norm_epsilon(torch: bool) -> float:
  """Return the epsilon of batch normalization in PyTorch's or TensorFlow's models."""
  return TORCH_NORM_EPSILON if torch else BATCH_NORM_EPSILON


def build_efficientnet(config: ModelConfig, classes: int) -> EfficientNet:
  """Build the EfficientNet that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown.
  """
  return EfficientNet(config, efficientnet_shape(config.variant), classes)
