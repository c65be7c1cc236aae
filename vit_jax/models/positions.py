"""Position embeddings of Vision Transformers, and biases of attention scores.

Rotary positions are in rope.py.

Shapes: b batch, h w patch grid, n tokens, d width, c channels of a head.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.rope import RotaryPositions
from vit_jax.models.variants import ViTShape

# Kinds of positions with a table that is added to the tokens.
LEARNED_POSITIONS = ('learned', 'learned2d', 'learned+rope')


class PositionEmbedding(nn.Module):
  """Learned position embeddings for tokens [b, n, d], or for tokens on their grid [b, h, w, d].

  'learned' has one vector per token. 'learned2d' has one vector of width d/2 per column and one per
  row of the grid; a token's embedding is the two concatenated. The class token gets zeros from
  'learned2d', since it is a learned vector itself.

  Returns [1, n, d] or [1, h, w, d], to match the input.
  """

  kind: str
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h, w = self.grid
    n, d = math.prod(x.shape[1:-1]), x.shape[-1]
    init = nn.initializers.normal(0.02)
    if self.kind != 'learned2d':
      return self.param('pos_embedding', init, (1, n, d)).reshape(1, *x.shape[1:]).astype(x.dtype)
    columns = self.param('column_embedding', init, (w, d // 2)).astype(x.dtype)
    rows = self.param('row_embedding', init, (h, d // 2)).astype(x.dtype)
    columns = jnp.broadcast_to(columns[None], (h, w, d // 2))
    rows = jnp.broadcast_to(rows[:, None], (h, w, d // 2))
    table = jnp.concatenate([columns, rows], axis=-1).reshape(1, h * w, d)
    return jnp.pad(table, ((0, 0), (n - h * w, 0), (0, 0))).reshape(1, *x.shape[1:])


class RelativePositionBias(nn.Module):
  """Bias of attention scores [b, heads, n, n] from queries [b, n, heads, c].

  The bias is the scaled query times a learned vector of its offset to the key. Offsets are counted
  along the raster order of the tokens. All heads share the vectors.
  """

  @nn.compact
  def __call__(self, q: jax.Array) -> jax.Array:
    n, c = q.shape[1], q.shape[-1]
    table = self.param('embedding', nn.initializers.normal(0.02), (2 * n - 1, c)).astype(q.dtype)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return jnp.einsum(
      'bnhc,nmc->bhnm', q * c**-0.5, table[offsets], preferred_element_type=jnp.float32
    )


class RelativePositionTable(nn.Module):
  """Bias of attention scores [1, heads, n, n], as in BEiT (arXiv 2106.08254).

  It is learned for each head and each offset of two patches in rows and columns. With a class
  token, the table has three more rows: from it to a patch, from a patch to it, and to itself.
  """

  grid: tuple[int, int]
  class_token: bool

  @nn.compact
  def __call__(self, q: jax.Array) -> jax.Array:
    rows = relative_table_rows(self.grid) + 3 * self.class_token
    table = self.param('table', nn.initializers.zeros, (rows, q.shape[-2]))
    index = relative_table_index(self.grid, class_token=self.class_token)
    return jnp.moveaxis(table[index], -1, 0)[None]


def relative_table_rows(grid: tuple[int, int]) -> int:
  """Return the number of different offsets, in rows and columns, of two patches of a grid."""
  return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def relative_table_index(grid: tuple[int, int], *, class_token: bool) -> np.ndarray:
  """Return the row of the table for each query and key, int [n, n]."""
  (h, w), rows = grid, relative_table_rows(grid)
  y, x = np.divmod(np.arange(h * w), w)
  index = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
  if not class_token:
    return index
  index = np.pad(index, ((1, 0), (1, 0)))
  index[0, 1:], index[1:, 0], index[0, 0] = rows, rows + 1, rows + 2
  return index


def sincos2d_embedding(grid: tuple[int, int], width: int) -> jax.Array:
  """Return the fixed position embeddings [1, h·w, d] of arXiv 2205.01580.

  Each token has sin(x), cos(x), sin(y), cos(y) at d/4 frequencies each, in this order.
  """
  omega = 1e4 ** -jnp.linspace(0, 1, width // 4)
  y, x = (axis.reshape(-1, 1) * omega for axis in jnp.mgrid[: grid[0], : grid[1]])
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]


def rotary_positions(config: ModelConfig, grid: tuple[int, int]) -> RotaryPositions | None:
  """Return the rotation of queries and keys for a grid of patches, or None without one."""
  c = config
  if not c.has_rope:
    return None
  return RotaryPositions(grid, c.prefix_tokens, c.rope_theta, c.rope_grid, c.rope_register_theta)


def score_bias_factory(config: ModelConfig, grid: tuple[int, int]) -> Callable | None:
  """Return what makes the bias of attention scores, or None without one."""
  if config.position == 'relative':
    return functools.partial(RelativePositionBias, name='relative')
  if config.position == 'relative2d':
    return functools.partial(RelativePositionTable, grid, config.has_class_token, name='relative')
  return None


def check_positions(config: ModelConfig, shape: ViTShape):
  """Raise UserError if the position embeddings do not fit the rest of a model of this shape."""
  position = f'config.model.position={config.position!r}'
  position_at = f'config.model.position_at={config.position_at!r}'
  divisor = {'sincos2d': 4, 'learned2d': 2}.get(config.position, 1)
  if shape.width % divisor:
    raise UserError(f'{position}: a width of {shape.width} does not divide by {divisor}')
  if config.has_rope and shape.width // shape.heads % 4:
    raise UserError(
      f'{position}: {shape.width // shape.heads} channels in a head do not divide by 4'
    )
  if config.position_at != 'stem' and config.position not in LEARNED_POSITIONS:
    raise UserError(
      f'{position_at}: only {" and ".join(LEARNED_POSITIONS)} position embeddings can be added '
      f'there, not {config.position}'
    )
  if config.position_at != 'stem' and config.registers:
    raise UserError(
      f'{position_at}: config.model.registers={config.registers} have no position embeddings; '
      "use 'stem'"
    )
  if config.position == 'relative2d' and (config.registers or config.distillation_token):
    name = 'registers' if config.registers else 'distillation_token'
    raise UserError(
      f'{position}: config.model.{name}={getattr(config, name)} has no offset to the patches'
    )
  if config.rope_register_theta and math.isqrt(config.registers) ** 2 != config.registers:
    raise UserError(
      f'config.model.rope_register_theta={config.rope_register_theta:g}: '
      f'config.model.registers={config.registers} do not form a square'
    )
  if config.position.startswith('relative') and config.attention not in ('auto', 'xla'):
    raise UserError(
      f'{position}: config.model.attention={config.attention!r} cannot add a bias to its scores; '
      "use 'xla'"
    )
