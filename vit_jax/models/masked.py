"""Masked patch prediction, the self-supervision of arXiv 2010.11929, App. B.1.2: a part of the patches' embeddings is
corrupted, and what those patches look like is told from their tokens.

Shapes: b batch, h w patch grid, n patches, m of them corrupted, d width, t colours of a patch.
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

COLOR_LEVELS = 8  # Of a channel: 3 bits.
COLOR_CLASSES = COLOR_LEVELS**3
MASKED_FRACTION, SWAPPED_FRACTION = (
  0.8,
  0.1,
)  # Of the corrupted embeddings; the rest stay as they are.
MASKABLE_FAMILY = 'Vision Transformer'


class PatchCorruption(NamedTuple):
  """What becomes of the patches of each image."""

  places: jax.Array  # int [b, m], the corrupted ones, each once.
  source: jax.Array  # int [b, n], whose embedding each of all patches has: its own, or another's.
  masked: jax.Array  # bool [b, n], which have the mask instead.


def sample_corruption(key: jax.Array, b: int, n: int, m: int) -> PatchCorruption:
  """`m` of `n` patches of each image, and for each of them by chance the mask, another patch of its image, or itself."""
  order, fate, step = jax.random.split(key, 3)
  order = jnp.argsort(jax.random.bits(order, (b, n)), axis=1)
  corrupted = jnp.argsort(order, axis=1) < m
  fate, own = jax.random.uniform(fate, (b, n)), jnp.arange(n)
  other = (own + jax.random.randint(step, (b, n), 1, n)) % n
  swapped = corrupted & (fate >= MASKED_FRACTION) & (fate < MASKED_FRACTION + SWAPPED_FRACTION)
  return PatchCorruption(
    order[:, :m], jnp.where(swapped, other, own), corrupted & (fate < MASKED_FRACTION)
  )


def sample_eval_corruption(images: jax.Array, n: int, m: int) -> PatchCorruption:
  """The draw of each image [b, H, W, 3] in evaluation: of its pixels' sum alone, whatever batch and device it is in."""
  sums = images.astype(jnp.uint32).sum(axis=(1, 2, 3))
  drawn = jax.vmap(
    lambda number: sample_corruption(jax.random.fold_in(jax.random.key(0), number), 1, n, m)
  )(sums)
  return jax.tree.map(lambda x: x[:, 0], drawn)


def corrupt_embeddings(x: jax.Array, mask: jax.Array, drawn: PatchCorruption) -> jax.Array:
  """Embeddings [b, n, d] and the learned mask [1, 1, d] -> [b, n, d]."""
  return jnp.where(drawn.masked[..., None], mask, gather_patches(x, drawn.source))


def gather_patches(x: jax.Array, places: jax.Array) -> jax.Array:
  """Of [b, n, …] what is at `places` [b, m]: [b, m, …]."""
  return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def color_targets(images: jax.Array, patch: tuple[int, int], cells: int) -> jax.Array:
  """uint8 [b, H, W, 3] -> int [b, n, cells²]: the mean of each of a patch's cells, floor(mean / 256 · 8) of red, green and blue
  as the digits of a number below 512."""
  p, q = patch[0] // cells, patch[1] // cells
  rows = einops.rearrange(
    images.astype(jnp.int32),
    'b (h i p) (w j q) c -> b (h w) (i j) (p q) c',
    i=cells,
    j=cells,
    p=p,
    q=q,
  )
  levels = rows.sum(axis=3) // (256 // COLOR_LEVELS * p * q)
  return levels @ jnp.array([COLOR_LEVELS**2, COLOR_LEVELS, 1])


def pixel_targets(images: jax.Array, patch: tuple[int, int], config: ModelConfig) -> jax.Array:
  """uint8 [b, H, W, 3] -> float32 [b, n, values of a patch], as the model sees them."""
  x = normalize_images(images, dataclasses.replace(config, dtype='float32'))
  return einops.rearrange(x, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch[0], q=patch[1])


# What is told of a patch: (images, patch, config) -> [b, n, …]. Of whole numbers each is one of so many colours.
PATCH_TARGETS: dict[str, Callable] = {
  'colour': lambda images, patch, config: color_targets(images, patch, 1),
  'grid': lambda images, patch, config: color_targets(images, patch, GRID_CELLS),
  'pixels': pixel_targets,
}
GRID_CELLS = 4  # Along each side of a patch, in the grid.


class MaskedVisionTransformer(VisionTransformer):
  """uint8 images [b, H, W, 3] -> (what is said of the corrupted patches, what is so).

  Colours are float32 logits [b, m, t, 512] and int [b, m, t], pixels both [b, m, values]. With `train`, wants the random stream
  'dropout', of which it also draws what is corrupted; without, that is fixed for each image.
  """

  target: str = 'colour'
  rate: float = 0.5

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
    b, grid = images.shape[0], self.shape.grid(images.shape[1:3])
    n = math.prod(grid)
    m = corrupted_patches(n, self.rate)
    drawn = (
      sample_corruption(self.make_rng('dropout'), b, n, m)
      if train
      else sample_eval_corruption(images, n, m)
    )
    x = self.embed(images)
    mask = self.param('mask', nn.initializers.normal(0.02), (1, 1, self.shape.width)).astype(
      x.dtype
    )
    x = self.encode(corrupt_embeddings(x, mask, drawn), grid, train)[:, -n:]
    actual = gather_patches(
      PATCH_TARGETS[self.target](images, self.shape.patch, self.config), drawn.places
    )  # [b, m, t] or [b, m, values]
    classes = (COLOR_CLASSES,) if jnp.issubdtype(actual.dtype, jnp.integer) else ()
    units = actual.shape[-1] * math.prod(classes)
    head = nn.Dense(units, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name='patch_head')
    return head(gather_patches(x, drawn.places)).reshape(*actual.shape, *classes), actual


def corrupted_patches(n: int, rate: float) -> int:
  """How many of `n` patches are."""
  return round(n * rate)


def build_masked_vit(config: Config) -> MaskedVisionTransformer:
  """The model that learns by config.mask what config.model will use. UserError where those do not go together."""
  c, mask = config.model, config.mask
  why = f'config.mask.target={mask.target!r}'
  if family_name(c.variant) != MASKABLE_FAMILY:
    raise UserError(
      f'{why} needs a plain {MASKABLE_FAMILY}: {c.variant} is {with_article(family_name(c.variant))}'
    )
  if c.pool == 'map':
    raise UserError(f"config.model.pool='map': {why} would not train it; use token or gap")
  plain = build_model(c, 0)
  patch, n = plain.shape.patch, math.prod(plain.shape.grid(config.data.size))
  if mask.target == 'grid' and (patch[0] % GRID_CELLS or patch[1] % GRID_CELLS):
    raise UserError(
      f'{why}: a patch of {patch[0]}x{patch[1]} does not divide into {GRID_CELLS}x{GRID_CELLS}; use colour'
    )
  if n < 2 or not corrupted_patches(n, mask.rate):
    raise UserError(
      f'config.mask.rate={mask.rate:g} corrupts {corrupted_patches(n, mask.rate)} of {n} patches: expected 1 of 2 or more'
    )
  return MaskedVisionTransformer(c, plain.shape, 0, target=mask.target, rate=mask.rate)
