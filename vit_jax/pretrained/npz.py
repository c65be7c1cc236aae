"""Google's names: the released .npz of 2020 and after, and big_vision's, to our tree and back.

Our names are theirs of 2020, so what is left is: where in the file the model is, newer names of the same layers, blocks kept
one by one or stacked, and position embeddings with or without a class token's row.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.blocks import STACKED, stack, unstack

KEY = 'embedding/kernel'
# Where the model is in a file: at its top, in a whole optimizer state (SAM), in big_vision's tree, its two-tower tree's images.
PREFIXES = ('', 'opt/target/', 'params/', 'params/img/', 'target/', 'img/')
BLOCK = re.compile(r'Transformer/encoderblock(?:_(\d+))?/(.*)')
# Linen counts layers of a kind, the files of 2020 all layers together.
NEWER = {
  'LayerNorm_1': 'LayerNorm_2',
  'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
  'MlpBlock_0': 'MlpBlock_3',
}
GROUP_NORM = re.compile(r'(.*/)?gn(\d|_root|_proj)/(scale|bias)')  # Stored as [1, 1, 1, c].
POSITION = 'Transformer/posembed_input/pos_embedding'

FACTS = {
  'gelu': 'tanh',
  'norm_eps': 1e-6,
  'mean': (127.5,) * 3,
  'scale': (127.5,) * 3,
  'crop': 'resize',
}


def place(arrays: Arrays) -> str | None:
  """The prefix of the model in the file, or None where there is none in this layout."""
  return next((prefix for prefix in PREFIXES if prefix + KEY in arrays), None)


def read_google(arrays: Arrays) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides). UserError where blocks are not whole."""
  prefix = place(arrays)
  inside = arrays.within(prefix)
  parts = {name: BLOCK.fullmatch(name) for name in inside}
  blocks = {int(part[1]) for part in parts.values() if part and part[1]}

  def stream():
    for name, part in parts.items():
      if not part:
        yield top_name(name), None, squeezed(name, inside[name])
        continue
      first, slash, rest = part[2].partition('/')
      yield (
        STACKED + NEWER.get(first, first) + slash + rest,
        int(part[1]) if part[1] else None,
        inside[name],
      )

  flat = stack(unique(stream(), arrays.source), depth=len(blocks), source=arrays.source)
  if 'pos_embedding' in inside and 'cls' in flat:  # big_vision has no row for the class token.
    table = flat[POSITION]
    flat[POSITION] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  beside = len(arrays) - len(inside)
  notes = (f'{beside} arrays beside those in {prefix} are left unread',) if beside else ()
  return flat, FACTS | {'assumed': tuple(FACTS), 'notes': notes}


def top_name(name: str) -> str:
  """Our name of an array outside the blocks."""
  return POSITION if name == 'pos_embedding' else name


def squeezed(name: str, array: np.ndarray) -> np.ndarray:
  """A group norm's [1, 1, 1, c] as [c]."""
  return (
    array.reshape(-1)
    if GROUP_NORM.fullmatch(name) and array.shape[:-1] == (1,) * (array.ndim - 1)
    else array
  )


def unique(stream, source: str):
  """The stream. UserError where two names of a file mean the same array."""
  seen = set()
  for name, block, array in stream:
    if (name, block) in seen:
      raise UserError(f'{source} holds {name} under an older and a newer name')
    seen.add((name, block))
    yield name, block, array


def to_google(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of an .npz of 2020, which the original code and timm read. UserError for what that layout has no name for."""
  for name in flat:
    if name == 'registers' or name.startswith('embedding/norm_'):
      raise UserError(
        f"Google's layout has no place for {name}: export to safetensors with timm's names"
      )
  out = {}
  for name, block, array in unstack(flat):
    if block is not None:
      name = f'Transformer/encoderblock_{block}/{name.removeprefix(STACKED)}'
    out[name] = array.reshape(1, 1, 1, -1) if GROUP_NORM.fullmatch(name) else array
  return out
