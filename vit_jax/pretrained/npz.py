"""Google's released .npz files: flat keys joined by '/', one subtree a block -> our tree, whose blocks are stacked."""

import re
from pathlib import Path

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError

BLOCK = re.compile(r'Transformer/encoderblock_(\d+)/(.*)')


def read_npz(path: Path) -> dict:
  """The parameters in a released file, as float32. UserError where it is no such file, or a block lacks an array."""
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name].astype(np.float32) for name in file.files}
  except (OSError, ValueError, EOFError, KeyError) as error:
    raise UserError(f'{path} is not a readable .npz of arrays: {str(error).splitlines()[0]}') from None
  if 'embedding/kernel' not in arrays:
    raise UserError(f'{path} has no embedding/kernel: it is not a released Vision Transformer')
  return flax.traverse_util.unflatten_dict(stack_blocks(arrays, path), sep='/')


def stack_blocks(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
  """Replaces `encoderblock_0` … `encoderblock_11` by one `encoderblock` whose arrays have the depth as leading axis."""
  blocks = {}
  for name, array in arrays.items():
    if match := BLOCK.fullmatch(name):
      blocks.setdefault(match[2], {})[int(match[1])] = array
  depth = max((len(found) for found in blocks.values()), default=0)
  for name, found in blocks.items():
    if missing := set(range(depth)) - set(found):
      raise UserError(f'{path}: Transformer/encoderblock_{min(missing)}/{name} is missing')
  rest = {name: array for name, array in arrays.items() if not BLOCK.fullmatch(name)}
  stacked = {f'Transformer/encoderblock/{name}': np.stack([found[i] for i in range(depth)]) for name, found in blocks.items()}
  return rest | stacked
