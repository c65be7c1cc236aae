"""Masked patch prediction, the self-supervision of arXiv 2010.11929, Appendix B.1.2.

The embeddings of some patches are corrupted. From the tokens of these patches, the model predicts
what the patches look like.

Shapes: b batch, H W image, h w patch grid, n patches, m corrupted patches, d width, t colors of a
patch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import Config, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.families import build_model, family_name, with_article
from vit_jax.models.layers import normalize_images
from vit_jax.models.vit import VisionTransformer

MASKABLE_FAMILY = 'Vision Transformer'
MASKED_FRACTION = 0.8  # Fraction of the corrupted patches that get the mask embedding.
SWAPPED_FRACTION = 0.1  # Fraction that get another patch's embedding; the rest keep their own.
COLOR_LEVELS = 8  # Levels per channel, 3 bits.
COLOR_CLASSES = COLOR_LEVELS**3
GRID_CELLS = 4  # Cells along each side of a patch, for the target 'grid'.


def build_masked_vit(config: Config) -> 'MaskedVisionTransformer':
  """Build the model that config.mask pre-trains for config.model.

  Raises UserError if config.model cannot be trained in this way.
  """
  c, mask = config.model, config.mask
  target = f'config.mask.target={mask.target!r}'
  if family_name(c.variant) != MASKABLE_FAMILY:
    raise UserError(
      f'{target} needs a plain {MASKABLE_FAMILY}: {c.variant} is '
      f'{with_article(family_name(c.variant))}'
    )
  if c.pool == 'map':
    raise UserError(f"config.model.pool='map': {target} does not train it; use token or gap")
  if c.channels != 3 and mask.target != 'pixels':
    raise UserError(
      f'{target} predicts colors, and config.model.channels={c.channels} has none; use pixels'
    )
  plain = build_model(c, 0)
  patch, n = plain.shape.patch, math.prod(plain.shape.grid(config.data.size))
  if mask.target == 'grid' and (patch[0] % GRID_CELLS or patch[1] % GRID_CELLS):
    raise UserError(
      f'{target}: a patch of {patch[0]}x{patch[1]} does not divide into {GRID_CELLS}x{GRID_CELLS} '
      'cells; use colour'
    )
  m = count_corrupted(n, mask.rate)
  if n < 2 or not m:
    raise UserError(
      f'config.mask.rate={mask.rate:g} corrupts {m} of {n} patches: expected at least 1 of 2'
    )
  return MaskedVisionTransformer(c, plain.shape, 0, target=mask.target, rate=mask.rate)


class MaskedVisionTransformer(VisionTransformer):
  """Vision Transformer that predicts the corrupted patches of uint8 images [b, H, W, 3].

  Returns (predictions, targets) of the corrupted patches. For the target 'pixels', both are float32
  [b, m, values]. For the others they are float32 logits [b, m, t, 512] and int [b, m, t].

  With `train`, the corruption is drawn from the random stream 'dropout', as dropout is. Otherwise
  it depends on the image alone.
  """

  target: str = 'colour'
  rate: float = 0.5

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
    b, grid = images.shape[0], self.shape.grid(images.shape[1:3])
    n = math.prod(grid)
    m = count_corrupted(n, self.rate)
    if train:
      corruption = sample_corruption(self.make_rng('dropout'), b, n, m)
    else:
      corruption = sample_eval_corruption(images, n, m)
    x = self.embed(images)
    init = nn.initializers.normal(0.02)
    mask = self.param('mask', init, (1, 1, self.shape.width)).astype(x.dtype)
    x = self.encode(corrupt_embeddings(x, mask, corruption), grid, train)
    x = gather_patches(x[:, -n:], corruption.indices)  # [b, m, d]
    targets = PATCH_TARGETS[self.target](images, self.shape.patch, self.config)
    targets = gather_patches(targets, corruption.indices)  # [b, m, t] or [b, m, values]
    classes = (COLOR_CLASSES,) if jnp.issubdtype(targets.dtype, jnp.integer) else ()
    head = nn.Dense(
      targets.shape[-1] * math.prod(classes),
      dtype=jnp.float32,
      kernel_init=nn.initializers.zeros,
      name='patch_head',
    )
    return head(x).reshape(*targets.shape, *classes), targets


class PatchCorruption(NamedTuple):
  """Choice of the patches to corrupt, and of what replaces each embedding."""

  indices: jax.Array  # int [b, m]: the corrupted patches, each once.
  source_indices: jax.Array  # int [b, n]: patch whose embedding is used, mostly the patch itself.
  is_masked: jax.Array  # bool [b, n]: whether the mask embedding is used instead.


def count_corrupted(n: int, rate: float) -> int:
  """Return how many of `n` patches are corrupted."""
  return round(n * rate)


def sample_corruption(key: jax.Array, b: int, n: int, m: int) -> PatchCorruption:
  """Choose `m` of `n` patches of each of `b` images at random, and how to corrupt each of them."""
  order_key, fate_key, step_key = jax.random.split(key, 3)
  order = jnp.argsort(jax.random.bits(order_key, (b, n)), axis=1)
  is_corrupted = jnp.argsort(order, axis=1) < m
  fate, own = jax.random.uniform(fate_key, (b, n)), jnp.arange(n)
  other = (own + jax.random.randint(step_key, (b, n), 1, n)) % n
  is_masked = is_corrupted & (fate < MASKED_FRACTION)
  is_swapped = is_corrupted & ~is_masked & (fate < MASKED_FRACTION + SWAPPED_FRACTION)
  return PatchCorruption(order[:, :m], jnp.where(is_swapped, other, own), is_masked)


def sample_eval_corruption(images: jax.Array, n: int, m: int) -> PatchCorruption:
  """Choose the corruption of each of the images [b, H, W, 3] from the sum of its pixels alone.

  The choice does not depend on the batch, the device or the step.
  """

  def sample_one(pixel_sum: jax.Array) -> PatchCorruption:
    return sample_corruption(jax.random.fold_in(jax.random.key(0), pixel_sum), 1, n, m)

  sums = images.astype(jnp.uint32).sum(axis=(1, 2, 3))
  return jax.tree.map(lambda x: x[:, 0], jax.vmap(sample_one)(sums))


def corrupt_embeddings(x: jax.Array, mask: jax.Array, corruption: PatchCorruption) -> jax.Array:
  """Apply a corruption to embeddings [b, n, d], given the mask embedding [1, 1, d]."""
  sources = gather_patches(x, corruption.source_indices)
  return jnp.where(corruption.is_masked[..., None], mask, sources)


def gather_patches(x: jax.Array, indices: jax.Array) -> jax.Array:
  """Return the rows [b, m, …] of x [b, n, …] at `indices` [b, m]."""
  return jnp.take_along_axis(x, indices.reshape(*indices.shape, *[1] * (x.ndim - 2)), axis=1)


def color_targets(images: jax.Array, patch: tuple[int, int], cells: int) -> jax.Array:
  """Return the color class of each cell of each patch: uint8 [b, H, W, 3] -> int [b, n, cells²].

  A patch has cells x cells cells. The class is the mean color of the cell, with 3 bits for each of
  red, green and blue: floor(mean / 256 · 8) are the digits of a number below 512.
  """
  p, q = patch[0] // cells, patch[1] // cells
  pixels = einops.rearrange(
    images.astype(jnp.int32),
    'b (h i p) (w j q) c -> b (h w) (i j) (p q) c',
    i=cells,
    j=cells,
    p=p,
    q=q,
  )
  # floor(sum / (p·q) / 256 · 8) in integers.
  levels = pixels.sum(axis=3) // (256 // COLOR_LEVELS * p * q)  # [b, n, cells², 3]
  return levels @ jnp.array([COLOR_LEVELS**2, COLOR_LEVELS, 1])


def pixel_targets(images: jax.Array, patch: tuple[int, int], config: ModelConfig) -> jax.Array:
  """Return the normalized pixels of each patch: uint8 [b, H, W, 3] -> float32 [b, n, values]."""
  x = normalize_images(images, dataclasses.replace(config, dtype='float32'))
  return einops.rearrange(x, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch[0], q=patch[1])


# Functions of (images, patch, config) that return what to predict of every patch, [b, n, …].
# Integers are color classes; floats are values to regress.
PATCH_TARGETS: dict[str, Callable] = {
  'colour': lambda images, patch, config: color_targets(images, patch, 1),
  'grid': lambda images, patch, config: color_targets(images, patch, GRID_CELLS),
  'pixels': pixel_targets,
}
