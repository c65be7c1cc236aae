"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), as its Figure 1 draws it.

Shapes: b batch, h w patch grid, n tokens, d width, m hidden width of the MLP, k classes.
Blocks are stacked: every parameter under `Transformer/encoderblock` has the depth as its leading axis. Names inside a block
are those of the released files, so reading one is un-flattening and stacking.
"""

import functools
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.attention import Attention
from vit_jax.models.layers import (
  LEARNED_POSITIONS,
  Dropout,
  PositionEmbedding,
  apply_drop_path,
  apply_head,
  normalize_images,
  sincos2d_embedding,
)
from vit_jax.models.resnet import resnet_v1
from vit_jax.models.variants import ViTShape, vit_shape

GELU_FUNCTIONS = {
  'tanh': functools.partial(nn.gelu, approximate=True),
  'erf': functools.partial(nn.gelu, approximate=False),
}
# What a block's backward pass need not compute again, by config.model.remat.
REMAT_POLICIES = {
  'none': lambda operation, *_, **__: operation.name not in REGATHERED_PRIMITIVES,
  'vit': jax.checkpoint_policies.save_only_these_names('qkv', 'attended', 'projected', 'hidden'),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}
# Gathered parameters and copies of them, where devices hold parts: gathered again, so that no device holds them all.
REGATHERED_PRIMITIVES = (
  'linear_call',
  'broadcast_in_dim',
  'concatenate',
  'convert_element_type',
  'name',
  'reshape',
  'transpose',
)


class MlpBlock(nn.Module):
  """[b, n, d] -> [b, n, m] -> [b, n, d]."""

  width: int
  gelu: str
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    dense = functools.partial(
      nn.Dense,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    drop = Dropout(self.dropout, deterministic=not train)
    hidden = checkpoint_name(dense(self.width, name='Dense_0')(x), 'hidden')
    hidden = drop(GELU_FUNCTIONS[self.gelu](hidden))
    return drop(dense(x.shape[-1], name='Dense_1')(hidden))


class EncoderBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); each branch dropped for whole images at `drop_path`, a scalar."""

  mlp: int
  heads: int
  attention: str
  gelu: str
  dropout: float
  drop_paths: bool
  norm_eps: float
  dtype: jnp.dtype
  relative: bool = False
  positions: Callable | None = None  # Makes those of this block alone.

  @nn.compact
  def __call__(
    self, x: jax.Array, drop_path: jax.Array, shared: jax.Array | None, train: bool
  ) -> tuple[jax.Array, None]:
    norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
    attention = Attention(
      self.heads, self.attention, self.dtype, self.relative, name='MultiHeadDotProductAttention_1'
    )
    mlp = MlpBlock(self.mlp, self.gelu, self.dropout, self.dtype, name='MlpBlock_3')
    drop = Dropout(self.dropout, deterministic=not train)
    path = lambda branch: (
      apply_drop_path(branch, self.make_rng('dropout'), drop_path)
      if train and self.drop_paths
      else branch
    )
    x = x if shared is None else x + shared
    x = x + self.positions()(x) if self.positions else x
    x = x + path(drop(attention(norm(name='LayerNorm_0')(x))))
    x = x + path(mlp(norm(name='LayerNorm_2')(x), train))
    return x, None


class PatchEmbedding(nn.Module):
  """Images [b, H, W, c] -> tokens [b, n, d]: each patch flattened and projected, with norms before and after where asked."""

  width: int
  patch: tuple[int, int]
  norms: bool
  norm_eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    (p, q), c = self.patch, images.shape[-1]
    # A convolution whose stride is its size, as the one matrix product that it is.
    x = einops.rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=p, q=q)
    norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
    x = norm(name='norm_before')(x) if self.norms else x
    lecun = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', in_axis=(0, 1, 2), out_axis=3
    )
    kernel = self.param('kernel', lecun, (p, q, c, self.width)).astype(self.dtype)
    bias = self.param('bias', nn.initializers.zeros, (self.width,)).astype(self.dtype)
    x = x @ kernel.reshape(-1, self.width) + bias
    return norm(name='norm_after')(x) if self.norms else x


class MapHead(nn.Module):
  """Attention pooling [b, n, d] -> [b, d]: one learned query over all tokens, then an MLP (arXiv 2106.04560)."""

  mlp: int
  heads: int
  gelu: str
  norm_eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])).astype(
      self.dtype
    )
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
    x = Attention(self.heads, 'xla', self.dtype, name='MultiHeadDotProductAttention_0')(probe, x)
    norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name='LayerNorm_0')
    mlp = MlpBlock(self.mlp, self.gelu, 0.0, self.dtype, name='MlpBlock_0')
    x = x + mlp(norm(x), train=False)
    return x[:, 0]  # [b, d]


class Transformer(nn.Module):
  """Tokens [b, n, d], or in their grid [b, h, w, d], -> the same: the blocks, one after another, and a norm."""

  config: ModelConfig
  shape: ViTShape
  grid: tuple[int, int]
  dtype: jnp.dtype
  gather: Callable | None = None
  block: type[EncoderBlock] = EncoderBlock

  @nn.compact
  def __call__(self, x: jax.Array, registers: jax.Array | None, train: bool) -> jax.Array:
    c, s = self.config, self.shape
    positions, shared = (
      functools.partial(PositionEmbedding, c.position, self.grid, name='posembed_input'),
      None,
    )
    if c.position in LEARNED_POSITIONS and c.position_at != 'every':
      shared = positions()(x)
    if c.position in LEARNED_POSITIONS and c.position_at == 'stem':
      x, shared = x + shared, None
    x = Dropout(c.dropout, deterministic=not train)(x)
    x = jnp.concatenate([x, registers], axis=1) if c.registers else x
    block = (
      self.block if self.gather is None else nn.map_variables(self.block, 'params', self.gather)
    )
    if c.remat != 'none' or self.gather:
      loop = (
        0 < c.unroll < self.shape.depth
      )  # Without one XLA would see both passes, and keep what is computed in each.
      block = nn.remat(
        block, prevent_cse=not loop, static_argnums=(4,), policy=REMAT_POLICIES[c.remat]
      )
    # Inside the scan, `train` is static and every block has its own parameters, its own key and its own rate.
    blocks = nn.scan(
      block,
      variable_axes={'params': 0, 'attention': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=s.depth,
      unroll=c.unroll or s.depth,
    )(
      *(s.mlp, s.heads, c.attention, c.gelu, c.dropout, c.drop_path > 0, c.norm_eps, self.dtype),
      relative=c.position == 'relative',
      positions=positions if c.position_at == 'every' else None,
      name='encoderblock',
    )
    x, _ = blocks(x, jnp.linspace(0, c.drop_path, s.depth), shared, train)
    return nn.LayerNorm(epsilon=c.norm_eps, dtype=self.dtype, name='encoder_norm')(x)


class VisionTransformer(nn.Module):
  """uint8 images [b, H, W, 3] -> float32 logits [b, k]. With `train`, wants the random stream 'dropout'.

  Without classes (0) there is no head, and what it would read [b, d] comes out. On the way, where their collections are
  mutable, it sows 'tokens' [b, n, d], 'features' [b, d] and each block's 'attention' [depth, b, heads, n, n].
  """

  config: ModelConfig
  shape: ViTShape
  classes: int
  gather: Callable | None = (
    None  # A block's {'params': …} as it lies on a device -> the whole of it.
  )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    c, grid = self.config, self.shape.grid(images.shape[1:3])
    x = self.encode(self.embed(images), grid, train)
    self.sow('tokens', 'tokens', x)
    x = self.pool(x)  # [b, d]
    if c.hidden_head:
      x = jnp.tanh(nn.Dense(self.shape.width, dtype=jnp.dtype(c.dtype), name='pre_logits')(x))
    self.sow('features', 'features', x)
    return x if not self.classes else apply_head(x, self.classes, c)

  def embed(self, images: jax.Array) -> jax.Array:
    """Images [b, H, W, 3] -> patches [b, h·w, d]."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    x = normalize_images(images, c)
    x = resnet_v1(self.shape.stem, x, dtype) if self.shape.stem else x
    return PatchEmbedding(
      self.shape.width, self.shape.patch, c.patch_norm, c.norm_eps, dtype, name='embedding'
    )(x)

  def encode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
    """Patches [b, h·w, d] -> tokens [b, n, d] after the last norm; the class token, where there is one, is the first."""
    c, dtype, d = self.config, jnp.dtype(self.config.dtype), self.shape.width
    if c.position == 'sincos2d':
      x = x + sincos2d_embedding(grid, d).astype(dtype)
    if c.pool == 'token':
      token = self.param('cls', nn.initializers.zeros, (1, 1, d)).astype(dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, d)), x], axis=1)
    tokens, registers = x.shape[1], None
    if c.registers:
      registers = self.param('registers', nn.initializers.normal(0.02), (1, c.registers, d)).astype(
        dtype
      )
      registers = jnp.broadcast_to(registers, (x.shape[0], c.registers, d))
    return Transformer(c, self.shape, grid, dtype, self.gather, name='Transformer')(
      x, registers, train
    )[:, :tokens]

  def pool(self, x: jax.Array) -> jax.Array:
    """Tokens [b, n, d] -> [b, d]."""
    if self.config.pool == 'token':
      return x[:, 0]
    if self.config.pool == 'gap':
      return x.mean(axis=1)
    c, s = self.config, self.shape
    return MapHead(s.mlp, s.heads, c.gelu, c.norm_eps, jnp.dtype(c.dtype), name='MAPHead_0')(x)


def build_vit(config: ModelConfig, classes: int) -> VisionTransformer:
  """The model that `config` describes, with a head for `classes` (0: none). UserError for a shape that does not work out."""
  c = config
  s = vit_shape(
    c.variant, width=c.width, depth=c.depth, mlp=c.mlp, heads=c.heads, stem_width=c.stem_width
  )
  check_positions(config, s.width)
  return VisionTransformer(config, s, classes)


def check_positions(config: ModelConfig, width: int):
  """UserError where the position embeddings of a model of that width do not go together with the rest of it."""
  kind, where = (
    f'config.model.position={config.position!r}',
    f'config.model.position_at={config.position_at!r}',
  )
  parts = {'sincos2d': 4, 'learned2d': 2}.get(config.position, 1)
  if width % parts:
    raise UserError(f'{kind}: a width of {width} does not divide by {parts}')
  if config.position_at != 'stem' and config.position not in LEARNED_POSITIONS:
    raise UserError(
      f'{where}: only {" and ".join(LEARNED_POSITIONS)} are added to tokens there, not {config.position}'
    )
  if config.position_at != 'stem' and config.registers:
    raise UserError(
      f'{where}: config.model.registers={config.registers} have no positions; use stem'
    )
  if config.position == 'relative' and config.attention not in ('auto', 'xla'):
    raise UserError(
      f'{kind}: config.model.attention={config.attention!r} has no place for it in its scores; use xla'
    )
