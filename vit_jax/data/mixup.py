"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) on the device.

They run on the global batch, because they mix examples that lie on different hosts. Each row is
mixed with the previous one, so only one row per device crosses the network. All rows share one
draw, as in timm's `batch` mode.

`mask` is bool [b], False in rows without an image, such as one that could not be read. Neither such
a row nor the row after it is mixed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Mixed = tuple[jax.Array, jax.Array]


def make_mix(
  *, mixup_alpha: float, cutmix_alpha: float, cutmix_probability: float
) -> Callable[..., Mixed] | None:
  """Return the function (key, images, targets, mask=) that mixes a batch; None without mixing.

  The alphas are parameters of Beta distributions, 0 if off. If both are on, a batch has CutMix with
  `cutmix_probability`, and mixup otherwise.
  """
  if mixup_alpha and cutmix_alpha:
    alphas = {'mixup_alpha': mixup_alpha, 'cutmix_alpha': cutmix_alpha}
    return functools.partial(mixup_or_cutmix, **alphas, probability=cutmix_probability)
  if cutmix_alpha:
    return functools.partial(cutmix, alpha=cutmix_alpha)
  return functools.partial(mixup, alpha=mixup_alpha) if mixup_alpha else None


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, mask: jax.Array, alpha: float
) -> Mixed:
  """Blend each image and its targets with those of the previous row.

  The larger of a weight from Beta(alpha, alpha) and its complement goes to the image itself.

  Args:
    key: The key of the draw.
    images: [b, h, w, c].
    targets: [b, k].
    mask: bool [b], as the module says.
    alpha: The parameter of the Beta distribution.

  Returns:
    The blended images, float32, and the blended targets.
  """
  weight = jax.random.beta(key, alpha, alpha)
  weight = jnp.where(mask & jnp.roll(mask, 1), jnp.maximum(weight, 1 - weight), 1)  # [b]

  def mix(x: jax.Array) -> jax.Array:
    w = weight.reshape(-1, *[1] * (x.ndim - 1))
    return w * x + (1 - w) * jnp.roll(x, 1, axis=0)

  return mix(images.astype(jnp.float32)), mix(targets)


def cutmix(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, mask: jax.Array, alpha: float
) -> Mixed:
  """Replace a box of each image by that of the previous row.

  The arguments are those of `mixup`. Images keep their type. The weight of an image's own
  targets is the part of it that stays.
  """
  box, kept = sample_box(key, images.shape[1:3], alpha)
  is_mixed = mask & jnp.roll(mask, 1)  # [b]
  replaced = box[:, :, None] & is_mixed[:, None, None, None]
  weight = jnp.where(is_mixed, kept, 1)[:, None]
  images = jnp.where(replaced, jnp.roll(images, 1, axis=0), images)
  return images, weight * targets + (1 - weight) * jnp.roll(targets, 1, axis=0)


def mixup_or_cutmix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  mask: jax.Array,
  mixup_alpha: float,
  cutmix_alpha: float,
  probability: float,
) -> Mixed:
  """Apply CutMix with this probability, and mixup otherwise. Images become float32."""
  switch_key, mixup_key, cutmix_key = jax.random.split(key, 3)
  use_cutmix = jax.random.bernoulli(switch_key, probability)
  box, kept = sample_box(cutmix_key, images.shape[1:3], cutmix_alpha)
  weight = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha)
  weight = jnp.maximum(weight, 1 - weight)
  # CutMix is a blend whose weight depends on the pixel.
  of_pixel = jnp.where(use_cutmix, 1 - box.astype(jnp.float32), weight)[:, :, None]  # [h, w, 1]
  is_mixed = mask & jnp.roll(mask, 1)  # [b]

  def mix(x: jax.Array, w: jax.Array) -> jax.Array:
    w = jnp.where(is_mixed.reshape(-1, *[1] * (x.ndim - 1)), w, 1)
    return w * x + (1 - w) * jnp.roll(x, 1, axis=0)

  weight = jnp.where(use_cutmix, kept, weight)
  return mix(images.astype(jnp.float32), of_pixel), mix(targets, weight)


def sample_box(key: jax.Array, size: tuple[int, int], alpha: float) -> tuple[jax.Array, jax.Array]:
  """Return a random box as bool [h, w], and the fraction of the image outside it.

  Its sides are those of the image times sqrt(1 - Beta(alpha, alpha)), rounded down. Its center is
  uniform, and what exceeds the image is cut off.
  """
  area_key, *center_keys = jax.random.split(key, 3)
  ratio = jnp.sqrt(1 - jax.random.beta(area_key, alpha, alpha))

  def covered(key: jax.Array, n: int) -> jax.Array:
    length, i = jnp.int32(n * ratio), jnp.arange(n)
    center = jax.random.randint(key, (), 0, n)
    return (i >= center - length // 2) & (i < center + (length + 1) // 2)

  rows, columns = (covered(*each) for each in zip(center_keys, size, strict=True))
  kept = 1 - rows.sum() * columns.sum() / (size[0] * size[1])
  return rows[:, None] & columns, kept
