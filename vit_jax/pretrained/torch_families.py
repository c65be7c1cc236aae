"""Rewrite what single families of PyTorch models store in another way than our tree.

Distilled DeiT has two heads, BEiT may share one table of relative positions, and EVA-02 and ViT-5
rotate other pairs of channels.

Shapes: l blocks, d width, h heads, c channels of a head, k classes.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import (
  ATTENTION_MODULE,
  BLOCK_PREFIX,
  POSITION_EMBEDDING,
  RELATIVE_TABLE,
  ArrayHeader,
  LazyArrays,
)

# Angles that the authors' files of ViT-5 (arXiv 2602.08071) have in each block.
VIT5_PATCH_FREQUENCIES = 'blocks.0.attn.rope.freqs'
VIT5_REGISTER_FREQUENCIES = 'blocks.0.attn.rope_reg.freqs'
VIT5_FREQUENCIES = re.compile(r'blocks\.\d+\.attn\.rope(_reg)?\.freqs')
VIT5_QUERY_NORM = 'blocks.0.attn.q_norm.weight'
# Tables that BEiT computes from the size of an image, as integers.
RELATIVE_INDEX = re.compile(r'(.*\.)?relative_position_index')


def join_distilled_heads(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the flat tree of a distilled DeiT with one layer that reads both of its tokens.

  The mean of a linear layer [d, k] of each token is one linear layer [2·d, k] of both side by side.
  A layer that reads the class token alone gets zeros for the other.
  """
  layer = 'pre_logits' if 'pre_logits/kernel' in flat else 'head'
  if 'dist' not in flat or f'{layer}/kernel' not in flat:
    return flat
  flat = dict(flat)
  kernel, bias = flat[f'{layer}/kernel'], flat.get(f'{layer}/bias')
  other = flat.pop('head_dist/kernel', None)
  other_bias = flat.pop('head_dist/bias', None)
  if other is None:
    return flat | {f'{layer}/kernel': np.concatenate([kernel, np.zeros_like(kernel)])}
  flat['head/kernel'] = np.concatenate([kernel, other]) / 2
  if bias is not None and other_bias is not None:
    flat['head/bias'] = (bias + other_bias) / 2
  return flat


def split_distilled_head(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the flat tree with a head for each token, whose mean is the head of both."""
  if 'dist' not in flat or 'head/kernel' not in flat:
    return flat
  kernel, other = np.split(2 * flat['head/kernel'], 2)
  return flat | {
    'head/kernel': kernel, 'head_dist/kernel': other, 'head_dist/bias': flat['head/bias'],
  }  # fmt: skip


def share_relative_table(
  headers: dict[str, ArrayHeader], shared: str, of_block: str, *, depth: int, source: str
) -> tuple[dict[str, ArrayHeader], tuple[str, ...]]:
  """Give each block a copy of the table that all blocks share, and return a note about it.

  `of_block` is the name of a block's table, with {} for its index. Raises UserError if the blocks
  have tables of their own too.
  """
  if shared not in headers:
    return headers, ()
  headers = dict(headers)
  table, names = headers.pop(shared), [of_block.format(i) for i in range(depth)]
  if own := [name for name in names if name in headers]:
    raise UserError(f'{source} contains {shared} and {own[0]}, which is not supported')
  note = 'the blocks share a table of relative positions: each has a copy, which is trained alone'
  return headers | dict.fromkeys(names, table), (note,)


def check_one_kind_of_positions(flat: Mapping[str, np.ndarray], source: str):
  """Raise UserError if position embeddings are added both to patches and to attention scores."""
  if RELATIVE_TABLE in flat and POSITION_EMBEDDING in flat:
    raise UserError(
      f'{source} has absolute and relative position embeddings; supported is one of them'
    )


def pair_rotated_halves(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Reorder the channels of queries and keys from pairs (2i, 2i + 1) to (i, i + c/2).

  Scores do not depend on the order of the channels, so the function stays.
  """
  flat = dict(flat)
  for projection in ('query', 'key'):
    for leaf in ('/kernel', '/bias', '_norm/scale', '_norm/bias'):
      name = f'{BLOCK_PREFIX}{ATTENTION_MODULE}/{projection}{leaf}'
      if name in flat:
        array = flat[name]  # [l, …, c]
        flat[name] = np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)
  return flat


def read_vit5_facts(arrays: LazyArrays, width: int) -> dict:
  """Return the facts and the number of heads of a ViT-5 in its authors' names, or {}.

  The bases of the rotation follow from the stored angles, and the heads from the norms of their
  queries. The rest is that of `vit5_*` in the authors' code.
  """
  if VIT5_REGISTER_FREQUENCIES not in arrays or VIT5_QUERY_NORM not in arrays:
    return {}
  bases = []
  for name in (VIT5_PATCH_FREQUENCIES, VIT5_REGISTER_FREQUENCIES):
    angles = arrays[name]  # base^(-i / n) for i < n.
    if angles.ndim != 1 or len(angles) < 2 or not 0 < angles[1] < 1:
      raise UserError(f'{arrays.source}: {name} is not a list of falling angles')
    bases.append(float(f'{float(angles[1]) ** -len(angles):.4g}'))
  patches = arrays.shape_of('pos_embed')[1] if 'pos_embed' in arrays else 0
  side = round(patches**0.5)
  if not side or side * side != patches:
    raise UserError(f'{arrays.source}: a ViT-5 of {patches} position embeddings is not supported')
  return {
    'heads': width // arrays.shape_of(VIT5_QUERY_NORM)[0],
    'position': 'learned+rope',
    'rope_theta': bases[0],
    'rope_grid': side,
    'rope_register_theta': bases[1],
    'norm': 'rmsnorm',
  }
