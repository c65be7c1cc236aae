"""What tells a token where it is: the kinds of position embedding of arXiv 2010.11929, Appendix D.4, and fixed ones.

Shapes: b batch, h w patch grid, n tokens (a class token comes before the grid), d width, c channels of a head.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError

LEARNED = ('learned', 'learned2d')  # Tables that are added to tokens.


class PositionEmbedding(nn.Module):
  """Learned vectors [1, n, d] for tokens like `x` [b, n, d], or [1, h, w, d] for those in their grid [b, h, w, d].

  'learned' has one for each token. 'learned2d' has one of half the width for each column and each row of the grid, side by
  side, and zeros for a class token, which is learned as it is.
  """

  kind: str
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    (h, w), n, d, normal = self.grid, math.prod(x.shape[1:-1]), x.shape[-1], nn.initializers.normal(0.02)
    if self.kind == 'learned':
      return self.param('pos_embedding', normal, (1, n, d)).reshape(1, *x.shape[1:]).astype(x.dtype)
    columns = self.param('column_embedding', normal, (w, d // 2)).astype(x.dtype)
    rows = self.param('row_embedding', normal, (h, d // 2)).astype(x.dtype)
    columns, rows = (jnp.broadcast_to(side, (h, w, d // 2)) for side in (columns[None], rows[:, None]))
    table = jnp.concatenate([columns, rows], axis=-1).reshape(1, h * w, d)
    return jnp.pad(table, ((0, 0), (n - h * w, 0), (0, 0))).reshape(1, *x.shape[1:])


class RelativePositions(nn.Module):
  """Queries [b, n, h, c] -> [b, h, n, n], to be added to the scores: each query times a vector of its offset to the key.

  Offsets are along the raster, and the vectors the same for all heads.
  """

  @nn.compact
  def __call__(self, q: jax.Array) -> jax.Array:
    n, c = q.shape[1], q.shape[-1]
    table = self.param('embedding', nn.initializers.normal(0.02), (2 * n - 1, c)).astype(q.dtype)
    offsets = jnp.arange(n)[:, None] - jnp.arange(n) + n - 1
    return jnp.einsum('bnhc,nmc->bhnm', q * c**-0.5, table[offsets], preferred_element_type=jnp.float32)


def sincos2d(grid: tuple[int, int], width: int) -> jax.Array:
  """Fixed position embeddings [1, h·w, d] of arXiv 2205.01580: the sines and cosines of x, then those of y."""
  omega = 1e4 ** -jnp.linspace(0, 1, width // 4)
  y, x = (axis.reshape(-1, 1) * omega for axis in jnp.mgrid[: grid[0], : grid[1]])
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]


def refuse_positions(config: ModelConfig, width: int):
  """UserError where the position embeddings of a model of that width do not go together with the rest of it."""
  kind, where = f'config.model.position={config.position!r}', f'config.model.position_at={config.position_at!r}'
  parts = {'sincos2d': 4, 'learned2d': 2}.get(config.position, 1)
  if width % parts:
    raise UserError(f'{kind}: a width of {width} does not divide by {parts}')
  if config.position_at != 'stem' and config.position not in LEARNED:
    raise UserError(f'{where}: only {" and ".join(LEARNED)} are added to tokens there, not {config.position}')
  if config.position_at != 'stem' and config.registers:
    raise UserError(f'{where}: config.model.registers={config.registers} have no positions; use stem')
  if config.position == 'relative' and config.attention not in ('auto', 'xla'):
    raise UserError(f'{kind}: config.model.attention={config.attention!r} has no place for it in its scores; use xla')
