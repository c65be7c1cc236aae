"""The ResNet that the hybrids of "An Image is Worth 16x16 Words" (arXiv 2010.11929, §3.1) put before their patches.

Convolutions with standardised kernels and GroupNorm, activations after the norms ("V1"), padding as XLA's SAME.
Shapes: b batch, h w places, c channels. Names are those of the released files.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.variants import Stem

GROUPS = 32
NORM_EPS = 1e-6  # Flax's default, which the released code has; timm has 1e-5.
STD_EPS = 1e-5  # Added to the deviation, not to the variance.


class StdConv(nn.Module):
  """A convolution without bias whose kernel has mean 0 and deviation 1 for each output channel (arXiv 1903.10520)."""

  channels: int
  side: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (self.side, self.side, x.shape[-1], self.channels))
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = (kernel / (kernel.std(axis=(0, 1, 2)) + STD_EPS)).astype(self.dtype)
    return jax.lax.conv_general_dilated(
      x, kernel, (self.stride, self.stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


class Unit(nn.Module):
  """A bottleneck [b, h, w, c] -> [b, h/stride, w/stride, 4·width]: relu(shortcut + norm(conv(…)))."""

  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = lambda name, channels, side, stride=1: StdConv(channels, side, stride, self.dtype, name=name)
    norm = lambda name, **init: nn.GroupNorm(GROUPS, epsilon=NORM_EPS, dtype=self.dtype, name=name, **init)
    w, shortcut = self.width, x
    if x.shape[-1] != 4 * w or self.stride != 1:
      shortcut = norm('gn_proj')(conv('conv_proj', 4 * w, 1, self.stride)(x))
    x = nn.relu(norm('gn1')(conv('conv1', w, 1)(x)))
    x = nn.relu(norm('gn2')(conv('conv2', w, 3, self.stride)(x)))
    x = norm('gn3', scale_init=nn.initializers.zeros)(conv('conv3', 4 * w, 1)(x))
    return nn.relu(shortcut + x)


class Stage(nn.Module):
  """Units one after another; the first strides."""

  units: int
  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.units):
      x = Unit(self.width, self.stride if i == 0 else 1, self.dtype, name=f'unit{i + 1}')(x)
    return x


def resnet(stem: Stem, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Images [b, H, W, 3] -> [b, H/stride, W/stride, channels]: the root, then the stages.

  Called inside a compact module, whose parameters conv_root, gn_root, block1, block2, … it makes: the released files have
  them at their top.
  """
  x = StdConv(stem.width, 7, 2, dtype, name='conv_root')(images)
  x = nn.relu(nn.GroupNorm(GROUPS, epsilon=NORM_EPS, dtype=dtype, name='gn_root')(x))
  x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
  for i, units in enumerate(stem.blocks):
    x = Stage(units, stem.width * 2**i, 1 if i == 0 else 2, dtype, name=f'block{i + 1}')(x)
  return x
