"""BiT's ResNets (arXiv 1912.11370): convolutions with standardised kernels, and GroupNorm.

In two forms. V1 has its activations after the norms of a unit: it is the stem of the hybrids of "An Image is Worth 16x16 Words"
(arXiv 2010.11929, §3.1), and what we take that paper's own ResNets to be, which it does not say. V2 has them before the
convolutions: the published BiT-S and BiT-M weights are its. The two also differ in their epsilons and their padding.
Shapes: b batch, h w places, c channels. Names are those of the released hybrids.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.layers import apply_head, normalize_images
from vit_jax.models.variants import NORM_GROUPS, ResNetBackbone, ResNetShape, resnet_shape


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetVersion:
  """What V1 and V2 differ in besides the order of their layers."""

  std_eps: float  # Added to the deviation of a kernel …
  var_eps: float  # … or to its variance.
  norm_eps: float
  same: bool  # Padding as XLA's SAME, which strides put all on the right, or half the kernel on either side.


RESNET_V1 = ResNetVersion(std_eps=1e-5, var_eps=0.0, norm_eps=1e-6, same=True)
RESNET_V2 = ResNetVersion(std_eps=0.0, var_eps=1e-10, norm_eps=1e-5, same=False)


class StdConv(nn.Module):
  """A convolution without bias whose kernel has mean 0 and deviation 1 for each output channel (arXiv 1903.10520)."""

  channels: int
  side: int
  stride: int
  form: ResNetVersion
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (self.side, self.side, x.shape[-1], self.channels)
    )
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    deviation = jnp.sqrt(kernel.var(axis=(0, 1, 2)) + self.form.var_eps) + self.form.std_eps
    padding = 'SAME' if self.form.same else [(self.side // 2, self.side // 2)] * 2
    strides, layout = (self.stride, self.stride), ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, (kernel / deviation).astype(self.dtype), strides, padding, dimension_numbers=layout
    )


def make_conv_and_norm(form: ResNetVersion, dtype: jnp.dtype):
  """(a convolution of (name, channels, side, stride), a norm of (name)) of that form."""
  conv = lambda name, channels, side, stride=1: StdConv(
    channels, side, stride, form, dtype, name=name
  )
  norm = lambda name, **init: nn.GroupNorm(
    NORM_GROUPS, epsilon=form.norm_eps, dtype=dtype, name=name, **init
  )
  return conv, norm


class Bottleneck(nn.Module):
  """A bottleneck of V1, [b, h, w, c] -> [b, h/stride, w/stride, 4·width]: relu(shortcut + norm(conv(…)))."""

  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv, norm = make_conv_and_norm(RESNET_V1, self.dtype)
    w, shortcut = self.width, x
    if x.shape[-1] != 4 * w or self.stride != 1:
      shortcut = norm('gn_proj')(conv('conv_proj', 4 * w, 1, self.stride)(x))
    x = nn.relu(norm('gn1')(conv('conv1', w, 1)(x)))
    x = nn.relu(self.spatial(x))
    x = norm('gn3', scale_init=nn.initializers.zeros)(conv('conv3', 4 * w, 1)(x))
    return nn.relu(shortcut + x)

  def spatial(self, x: jax.Array) -> jax.Array:
    """[b, h, w, width] -> [b, h/stride, w/stride, width]: the layer that looks at more than one place."""
    conv, norm = make_conv_and_norm(RESNET_V1, self.dtype)
    return norm('gn2')(conv('conv2', self.width, 3, self.stride)(x))


class PreactBottleneck(nn.Module):
  """A bottleneck of V2, [b, h, w, c] -> [b, h/stride, w/stride, 4·width]: shortcut + conv(relu(norm(…)))."""

  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv, norm = make_conv_and_norm(RESNET_V2, self.dtype)
    w, shortcut = self.width, x
    x = nn.relu(norm('gn1')(x))
    if shortcut.shape[-1] != 4 * w or self.stride != 1:
      shortcut = conv('conv_proj', 4 * w, 1, self.stride)(x)
    x = conv('conv1', w, 1)(x)
    x = conv('conv2', w, 3, self.stride)(nn.relu(norm('gn2')(x)))
    x = conv('conv3', 4 * w, 1)(nn.relu(norm('gn3')(x)))
    return shortcut + x


class ResNetStage(nn.Module):
  """Units one after another; the first strides."""

  unit: type[nn.Module]
  units: int
  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.units):
      x = self.unit(self.width, self.stride if i == 0 else 1, self.dtype, name=f'unit{i + 1}')(x)
    return x


def apply_stages(
  stem: ResNetBackbone, x: jax.Array, unit: type[nn.Module], dtype: jnp.dtype
) -> jax.Array:
  """What the root gives -> [b, h, w, c] of the last stage. Called inside a compact module: block1, block2, … are its own."""
  for i, units in enumerate(stem.blocks):
    x = ResNetStage(
      unit, units, stem.width * 2**i, 1 if i == 0 else 2, dtype, name=f'block{i + 1}'
    )(x)
  return x


def resnet_v1(
  stem: ResNetBackbone,
  images: jax.Array,
  dtype: jnp.dtype,
  remat: str = 'none',
  unit: type[Bottleneck] = Bottleneck,
) -> jax.Array:
  """Images [b, H, W, 3] -> [b, H/stride, W/stride, channels]: the root, then the stages.

  Called inside a compact module, whose parameters conv_root, gn_root, block1, block2, … it makes: the released files have
  them at their top.
  """
  conv, norm = make_conv_and_norm(RESNET_V1, dtype)
  x = nn.relu(norm('gn_root')(conv('conv_root', stem.width, 7, 2)(images)))
  x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
  return apply_stages(stem, x, RESNET_REMAT[remat](unit), dtype)


def resnet_v2(
  stem: ResNetBackbone, images: jax.Array, dtype: jnp.dtype, remat: str = 'none'
) -> jax.Array:
  """As `resnet_v1`; the root has no norm, and the last stage is followed by one, norm-pre-head."""
  conv, norm = make_conv_and_norm(RESNET_V2, dtype)
  x = conv('conv_root', stem.width, 7, 2)(images)
  x = jnp.pad(
    x, ((0, 0), (1, 1), (1, 1), (0, 0))
  )  # With zeros, which may be more than what is there.
  x = nn.max_pool(x, (3, 3), strides=(2, 2))
  return nn.relu(
    norm('norm-pre-head')(apply_stages(stem, x, RESNET_REMAT[remat](PreactBottleneck), dtype))
  )


# What the backward pass computes again: nothing, or each unit.
RESNET_REMAT = {'none': lambda unit: unit, 'full': nn.remat}


class ResNet(nn.Module):
  """uint8 images [b, H, W, 3] -> float32 logits [b, k]; without classes (0) the features [b, d], which it also sows."""

  config: ModelConfig
  shape: ResNetShape
  classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    x = self.convolve(normalize_images(images, self.config))
    x = x.mean(axis=(1, 2))  # [b, d]
    self.sow('features', 'features', x)
    return x if not self.classes else apply_head(x, self.classes, self.config)

  def convolve(self, x: jax.Array) -> jax.Array:
    """Images [b, H, W, 3] -> [b, h, w, d] of the last stage."""
    form = resnet_v2 if self.shape.preactivated else resnet_v1
    return form(self.shape.stem, x, jnp.dtype(self.config.dtype), self.config.remat)


def build_resnet(config: ModelConfig, classes: int) -> ResNet:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  return ResNet(config, resnet_shape(config.variant, stem_width=config.stem_width), classes)
