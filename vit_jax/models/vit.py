"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929, Figure 1).

Blocks are stacked: every parameter under `Transformer/encoderblock` has the depth as its leading
axis. Names inside a block are those of the released files, so reading one is un-flattening and
stacking.

Shapes: b batch, H W image, h w patch grid, p q patch, c channels, n tokens, d width, m hidden width
of the MLP, k classes.
"""

import dataclasses
import functools
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.config import ModelConfig
from vit_jax.models.attention import Attention
from vit_jax.models.layers import (
  Dropout,
  apply_drop_path,
  apply_head,
  norm_factory,
  normalize_images,
)
from vit_jax.models.positions import (
  LEARNED_POSITIONS,
  PositionEmbedding,
  check_positions,
  rotary_positions,
  score_bias_factory,
  sincos2d_embedding,
)
from vit_jax.models.resnet import resnet_v1
from vit_jax.models.rope import RotaryPositions
from vit_jax.models.variants import ViTShape, vit_shape

GELU_FUNCTIONS = {
  'tanh': functools.partial(nn.gelu, approximate=True),
  'erf': functools.partial(nn.gelu, approximate=False),
  'quick': lambda x: x * jax.nn.sigmoid(1.702 * x),
}
# What the backward pass of a block may read from memory instead of recomputing it. 'none' keeps all
# but gathered parameters.
REMAT_POLICIES = {
  'none': lambda primitive, *_, **__: primitive.name not in REGATHERED_PRIMITIVES,
  'vit': jax.checkpoint_policies.save_only_these_names('qkv', 'attended', 'projected', 'hidden'),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}
# JAX primitives that produce gathered parameters or copies of them. With sharded parameters the
# backward pass gathers again, so that no device ever holds the parameters of all blocks.
REGATHERED_PRIMITIVES = (
  'linear_call', 'broadcast_in_dim', 'concatenate', 'convert_element_type', 'name', 'reshape',
  'transpose',
)  # fmt: skip


class MlpBlock(nn.Module):
  """Two linear layers with GELU between them, [b, n, d] -> [b, n, m] -> [b, n, d].

  With `swiglu`, the hidden layer is silu of a third linear layer, the gate, times the first.
  `norm` makes a norm of the hidden layer.
  """

  width: int
  gelu: str
  dropout: float
  dtype: jnp.dtype
  swiglu: bool = False
  norm: Callable | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    dense = functools.partial(
      nn.Dense,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    drop = Dropout(self.dropout, deterministic=not train)
    hidden = checkpoint_name(dense(self.width, name='Dense_0')(x), 'hidden')  # [b, n, m]
    if self.swiglu:
      gate = checkpoint_name(dense(self.width, name='Gate')(x), 'hidden')
      hidden = drop(nn.silu(gate) * hidden)
    else:
      hidden = drop(GELU_FUNCTIONS[self.gelu](hidden))
    hidden = self.norm(name='hidden_norm')(hidden) if self.norm else hidden
    return drop(dense(x.shape[-1], name='Dense_1')(hidden))


class EncoderBlock(nn.Module):
  """x = x + attention(norm(x)), then x = x + mlp(norm(x)), for tokens [b, n, d].

  In training with stochastic depth, each branch is dropped for a fraction `drop_path` of the
  images. With LayerScale, a branch is multiplied by a trained factor for each channel.
  """

  config: ModelConfig
  shape: ViTShape
  rope: RotaryPositions | None = None
  make_positions: Callable | None = None  # Makes the position embeddings that this block adds.
  make_score_bias: Callable | None = None  # Makes what is added to the attention scores.

  @nn.compact
  def __call__(
    self, x: jax.Array, drop_path: jax.Array, shared: jax.Array | None, train: bool
  ) -> tuple[jax.Array, None]:
    """Apply the block; the second result is the empty output that `nn.scan` expects.

    Args:
      x: Tokens [b, n, d].
      drop_path: Drop rate of this block, a scalar.
      shared: Position embeddings [1, n, d] that every block adds to its input.
      train: Whether to apply dropout and stochastic depth.
    """
    c, s, dtype = self.config, self.shape, jnp.dtype(self.config.dtype)
    norm = norm_factory(c)
    attention = Attention(
      s.heads,
      c.attention,
      dtype,
      make_score_bias=self.make_score_bias,
      qkv_bias=c.qkv_bias,
      qk_norm=norm if c.qk_norm else None,
      rope=self.rope,
      name='MultiHeadDotProductAttention_1',
    )
    hidden_norm = norm if c.mlp_norm else None
    mlp = MlpBlock(s.mlp, c.gelu, c.dropout, dtype, c.swiglu, hidden_norm, name='MlpBlock_3')
    drop = Dropout(c.dropout, deterministic=not train)

    def scale_and_drop(branch: jax.Array, scale_name: str) -> jax.Array:
      if c.layer_scale:
        init = nn.initializers.constant(c.layer_scale)
        branch = branch * self.param(scale_name, init, branch.shape[-1:]).astype(dtype)
      if not train or not c.drop_path:
        return branch
      return apply_drop_path(branch, self.make_rng('dropout'), drop_path)

    x = x if shared is None else x + shared
    x = x + self.make_positions()(x) if self.make_positions else x
    x = x + scale_and_drop(drop(attention(norm(name='LayerNorm_0')(x))), 'attention_scale')
    x = x + scale_and_drop(mlp(norm(name='LayerNorm_2')(x), train), 'mlp_scale')
    return x, None


class PatchEmbedding(nn.Module):
  """Linear projection of flattened patches, [b, H, W, c] -> [b, n, d].

  `norm` makes norms before and after the projection.
  """

  width: int
  patch: tuple[int, int]
  norm: Callable | None
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    (p, q), c = self.patch, images.shape[-1]
    # A convolution whose stride equals its kernel size is one matrix product.
    x = einops.rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=p, q=q)
    x = self.norm(name='norm_before')(x) if self.norm else x
    init = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', in_axis=(0, 1, 2), out_axis=3
    )
    kernel = self.param('kernel', init, (p, q, c, self.width)).astype(self.dtype)
    x = x @ kernel.reshape(-1, self.width)  # [b, n, d]
    if self.use_bias:
      x = x + self.param('bias', nn.initializers.zeros, (self.width,)).astype(self.dtype)
    return self.norm(name='norm_after')(x) if self.norm else x


class MapHead(nn.Module):
  """Multi-head attention pooling, [b, n, d] -> [b, d] (arXiv 2106.04560).

  One learned query attends to all tokens, and an MLP follows.
  """

  mlp: int
  heads: int
  gelu: str
  norm: Callable
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, _, d = x.shape
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, d)).astype(self.dtype)
    probe = jnp.broadcast_to(probe, (b, 1, d))
    x = Attention(self.heads, 'xla', self.dtype, name='MultiHeadDotProductAttention_0')(probe, x)
    mlp = MlpBlock(self.mlp, self.gelu, 0.0, self.dtype, name='MlpBlock_0')
    x = x + mlp(self.norm(name='LayerNorm_0')(x), train=False)  # [b, 1, d]
    return x[:, 0]


class Transformer(nn.Module):
  """The encoder: position embeddings, the stack of blocks and a final norm.

  Tokens are [b, n, d] or, for blocks that need their grid, [b, h, w, d]. The result has the same
  shape, plus the registers.
  """

  config: ModelConfig
  shape: ViTShape
  grid: tuple[int, int]
  dtype: jnp.dtype
  gather: Callable | None = None
  block_cls: type[EncoderBlock] = EncoderBlock

  @nn.compact
  def __call__(self, x: jax.Array, registers: jax.Array | None, train: bool) -> jax.Array:
    c, s = self.config, self.shape
    make_positions = functools.partial(
      PositionEmbedding, c.position, self.grid, name='posembed_input'
    )
    shared = None
    if c.position in LEARNED_POSITIONS and c.position_at == 'stem':
      x = x + make_positions()(x)
    if c.position in LEARNED_POSITIONS and c.position_at == 'shared':
      shared = make_positions()(x)
    x = Dropout(c.dropout, deterministic=not train)(x)
    x = jnp.concatenate([x, registers], axis=1) if c.registers else x
    norm = norm_factory(c)
    x = norm(name='pre_norm')(x) if c.pre_norm else x
    # Inside the scan, `train` is static, and every block has its own parameters, key and drop rate.
    blocks = nn.scan(
      self.rematerialized_block(),
      variable_axes={'params': 0, 'attention': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=s.depth,
      unroll=c.unroll or s.depth,
    )(
      *(c, s, rotary_positions(c, self.grid)),
      make_positions=make_positions if c.position_at == 'every' else None,
      make_score_bias=score_bias_factory(c, self.grid),
      name='encoderblock',
    )
    x, _ = blocks(x, drop_path_rates(c, s.depth), shared, train)
    return x if c.fc_norm else norm(name='encoder_norm')(x)

  def rematerialized_block(self) -> type[nn.Module]:
    """Return `block_cls` with its parameters gathered and its activations recomputed as needed."""
    c, block = self.config, self.block_cls
    if self.gather is not None:
      block = nn.map_variables(block, 'params', self.gather)
    if c.remat == 'none' and self.gather is None:
      return block
    # Without a loop, XLA sees both passes at once and would keep what each of them computes.
    has_loop = 0 < c.unroll < self.shape.depth
    policy = REMAT_POLICIES[c.remat]
    return nn.remat(block, prevent_cse=not has_loop, static_argnums=(4,), policy=policy)


def drop_path_rates(config: ModelConfig, depth: int) -> jax.Array:
  """Return the drop rate of each block, [depth]: growing as in arXiv 1603.09382, or uniform."""
  if config.drop_path_schedule == 'uniform':
    return jnp.full(depth, config.drop_path)
  return jnp.linspace(0, config.drop_path, depth)


class VisionTransformer(nn.Module):
  """Vision Transformer from uint8 images [b, H, W, 3] to float32 logits [b, k].

  With `train`, it needs the random stream 'dropout'. With `classes` of 0 it has no head and returns
  the features [b, d] that a head would read.

  It sows 'tokens' [b, n, d], 'features' [b, d] and 'attention' [depth, b, heads, n, n] into the
  collections of these names, if they are mutable.

  `gather` turns the sharded {'params': …} of one block into the full arrays.
  """

  config: ModelConfig
  shape: ViTShape
  classes: int
  gather: Callable | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    c, grid = self.config, self.shape.grid(images.shape[1:3])
    x = self.encode(self.embed(images), grid, train)
    self.sow('tokens', 'tokens', x)
    x = self.pool(x)  # [b, d]
    if c.hidden_head:
      x = jnp.tanh(nn.Dense(self.shape.width, dtype=jnp.dtype(c.dtype), name='pre_logits')(x))
    self.sow('features', 'features', x)
    return apply_head(x, self.classes, c) if self.classes else x

  def embed(self, images: jax.Array) -> jax.Array:
    """Embed the patches of images, [b, H, W, 3] -> [b, h·w, d]."""
    c, s, dtype = self.config, self.shape, jnp.dtype(self.config.dtype)
    x = normalize_images(images, c)
    x = resnet_v1(s.backbone, x, dtype) if s.backbone else x
    embedding = PatchEmbedding(
      s.width,
      s.patch,
      norm_factory(c) if c.patch_norm else None,
      dtype,
      c.patch_bias,
      name='embedding',
    )
    return embedding(x)

  def encode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
    """Encode patches [b, h·w, d] into tokens [b, n, d] after the final norm, without registers.

    The class token and the distillation token, if they exist, come first.
    """
    c, (b, _, d) = self.config, x.shape
    dtype = jnp.dtype(c.dtype)
    if c.position == 'sincos2d':
      x = x + sincos2d_embedding(grid, d).astype(dtype)
    if c.distillation_token:  # Zeros, as of the class token, would make the two equal forever.
      x = self.prepend(x, 'dist', nn.initializers.normal(0.02))
    if c.has_class_token:
      x = self.prepend(x, 'cls', nn.initializers.zeros)
    n, registers = x.shape[1], None
    if c.registers:
      init = nn.initializers.normal(0.02)
      registers = self.param('registers', init, (1, c.registers, d)).astype(dtype)
      registers = jnp.broadcast_to(registers, (b, c.registers, d))
    transformer = Transformer(c, self.shape, grid, dtype, self.gather, name='Transformer')
    return transformer(x, registers, train)[:, :n]

  def prepend(self, x: jax.Array, name: str, init: Callable) -> jax.Array:
    """Put a learned token before the tokens [b, n, d] of each image."""
    b, _, d = x.shape
    token = self.param(name, init, (1, 1, d)).astype(self.config.dtype)
    return jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x], axis=1)

  def pool(self, x: jax.Array) -> jax.Array:
    """Pool tokens [b, n, d] into features [b, d], or [b, 2·d] with a distillation token."""
    c, s = self.config, self.shape
    if c.distillation_token:
      return x[:, :2].reshape(x.shape[0], -1)
    if c.pool == 'token':
      return x[:, 0]
    if c.pool == 'gap':
      x = x[:, int(c.class_token) :].mean(axis=1)
      return norm_factory(c)(name='fc_norm')(x) if c.fc_norm else x
    return MapHead(s.mlp, s.heads, c.gelu, norm_factory(c), jnp.dtype(c.dtype), name='MAPHead_0')(x)


def build_vit(config: ModelConfig, classes: int) -> VisionTransformer:
  """Build the Vision Transformer or hybrid that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown or its numbers do not fit together.
  """
  c = config
  numbers = {'width': c.width, 'depth': c.depth, 'mlp': c.mlp, 'heads': c.heads}
  shape = vit_shape(c.variant, **numbers, stem_width=c.stem_width, swiglu=c.swiglu)
  shape = dataclasses.replace(shape, extra_tokens=c.prefix_tokens + c.registers)
  check_positions(config, shape)
  return VisionTransformer(config, shape, classes)
