"""BiT's ResNets (arXiv 1912.11370): convolutions with standardized kernels, and GroupNorm.

There are two versions. V1 has its activations after the norms of a bottleneck; it is the backbone
of the hybrids of "An Image is Worth 16x16 Words" (arXiv 2010.11929, §3.1). We also use V1 for that
paper's own ResNets, whose version it does not state. V2 has its activations before the
convolutions; the published BiT-S and BiT-M weights are V2. The versions also differ in their
epsilons and their padding.

Parameter names are those of the released hybrids.

Shapes: b batch, H W image, h w feature map, c channels, d width of the features, k classes.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.layers import apply_head, normalize_images
from vit_jax.models.variants import NORM_GROUPS, ResNetBackbone, ResNetShape, resnet_shape

# How much the backward pass recomputes: nothing, or the inside of every bottleneck.
RESNET_REMAT = {'none': lambda unit_cls: unit_cls, 'full': nn.remat}


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetVersion:
  """Numbers that differ between V1 and V2, besides the order of the layers."""

  std_eps: float  # Added to the standard deviation of a kernel.
  var_eps: float  # Added to the variance of a kernel.
  norm_eps: float
  same_padding: bool  # XLA's SAME, uneven if a convolution strides; else half the kernel per side.


RESNET_V1 = ResNetVersion(std_eps=1e-5, var_eps=0.0, norm_eps=1e-6, same_padding=True)
RESNET_V2 = ResNetVersion(std_eps=0.0, var_eps=1e-10, norm_eps=1e-5, same_padding=False)


class StdConv(nn.Module):
  """Convolution without bias, with a standardized kernel (arXiv 1903.10520).

  The kernel of each output channel is scaled to mean 0 and standard deviation 1.
  """

  channels: int
  kernel_size: int
  stride: int
  version: ResNetVersion
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = self.kernel_size
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (size, size, x.shape[-1], self.channels)
    )
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    deviation = jnp.sqrt(kernel.var(axis=(0, 1, 2)) + self.version.var_eps) + self.version.std_eps
    return jax.lax.conv_general_dilated(
      x,
      (kernel / deviation).astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding='SAME' if self.version.same_padding else [(size // 2, size // 2)] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def make_conv_and_norm(version: ResNetVersion, dtype: jnp.dtype):
  """Return the factories conv(name, channels, kernel_size, stride=1) and norm(name, **fields)."""

  def conv(name: str, channels: int, kernel_size: int, stride: int = 1) -> StdConv:
    return StdConv(channels, kernel_size, stride, version, dtype, name=name)

  def norm(name: str, **fields) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, epsilon=version.norm_eps, dtype=dtype, name=name, **fields)

  return conv, norm


class Bottleneck(nn.Module):
  """V1 bottleneck: relu(shortcut + norm(conv(…))).

  Maps [b, h, w, c] to [b, h/stride, w/stride, 4·width]. The last norm starts with a scale of zero,
  so a new bottleneck passes on its shortcut.
  """

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
    """Apply the layer that mixes positions: [b, h, w, width] -> [b, h/stride, w/stride, width]."""
    conv, norm = make_conv_and_norm(RESNET_V1, self.dtype)
    return norm('gn2')(conv('conv2', self.width, 3, self.stride)(x))


class PreactBottleneck(nn.Module):
  """V2 bottleneck: shortcut + conv(relu(norm(…))).

  Maps [b, h, w, c] to [b, h/stride, w/stride, 4·width].
  """

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
  """Sequence of bottlenecks, of which only the first has the stride."""

  unit_cls: type[nn.Module]
  units: int
  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.units):
      stride = self.stride if i == 0 else 1
      x = self.unit_cls(self.width, stride, self.dtype, name=f'unit{i + 1}')(x)
    return x


def resnet_v1(
  backbone: ResNetBackbone,
  images: jax.Array,
  dtype: jnp.dtype,
  remat: str = 'none',
  unit_cls: type[Bottleneck] = Bottleneck,
) -> jax.Array:
  """Apply a V1 backbone, [b, H, W, 3] -> [b, H/stride, W/stride, c].

  Call it inside a compact module, which then owns the submodules conv_root, gn_root, block1,
  block2, …: the released files have them at their top level.
  """
  conv, norm = make_conv_and_norm(RESNET_V1, dtype)
  x = nn.relu(norm('gn_root')(conv('conv_root', backbone.width, 7, 2)(images)))
  x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
  return apply_stages(backbone, x, RESNET_REMAT[remat](unit_cls), dtype)


def resnet_v2(
  backbone: ResNetBackbone, images: jax.Array, dtype: jnp.dtype, remat: str = 'none'
) -> jax.Array:
  """Apply a V2 backbone, [b, H, W, 3] -> [b, H/stride, W/stride, c].

  Call it inside a compact module, as `resnet_v1`. The root has no norm; the norm `norm-pre-head`
  follows the last stage.
  """
  conv, norm = make_conv_and_norm(RESNET_V2, dtype)
  x = conv('conv_root', backbone.width, 7, 2)(images)
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # Zeros can win the maximum, unlike SAME's -inf.
  x = nn.max_pool(x, (3, 3), strides=(2, 2))
  x = apply_stages(backbone, x, RESNET_REMAT[remat](PreactBottleneck), dtype)
  return nn.relu(norm('norm-pre-head')(x))


def apply_stages(
  backbone: ResNetBackbone, x: jax.Array, unit_cls: type[nn.Module], dtype: jnp.dtype
) -> jax.Array:
  """Apply the stages block1, block2, … to the feature map of the root.

  Call it inside a compact module, which then owns the stages.
  """
  for i, units in enumerate(backbone.blocks_per_stage):
    stage = functools.partial(ResNetStage, unit_cls, units, backbone.width * 2**i)
    x = stage(1 if i == 0 else 2, dtype, name=f'block{i + 1}')(x)
  return x


class ResNet(nn.Module):
  """ResNet from uint8 images [b, H, W, 3] to float32 logits [b, k].

  With `classes` of 0 it has no head and returns the features [b, d]. It also sows them as
  'features'.
  """

  config: ModelConfig
  shape: ResNetShape
  classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    x = self.forward_features(normalize_images(images, self.config))
    x = x.mean(axis=(1, 2))  # [b, d]
    self.sow('features', 'features', x)
    return apply_head(x, self.classes, self.config) if self.classes else x

  def forward_features(self, x: jax.Array) -> jax.Array:
    """Return the last feature map [b, h, w, d] of normalized images [b, H, W, 3]."""
    resnet = resnet_v2 if self.shape.preactivated else resnet_v1
    return resnet(self.shape.backbone, x, jnp.dtype(self.config.dtype), self.config.remat)


def build_resnet(config: ModelConfig, classes: int) -> ResNet:
  """Build the ResNet that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown or its numbers do not fit together.
  """
  return ResNet(config, resnet_shape(config.variant, stem_width=config.stem_width), classes)
