"""Google's released .npz files: flat keys joined by '/', one subtree a block -> our tree, whose blocks are stacked."""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError

BLOCK = re.compile(r'Transformer/encoderblock_(\d+)/(.*)')
UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path) -> dict:
  """The parameters in a released file, as float32. UserError where it is no such file, or a block lacks an array."""
  try:
    arrays = dict(read_arrays(path))
  except UNREADABLE as error:
    why = str(error) or type(error).__name__
    raise UserError(f'{path} is not a readable .npz of arrays: {why.splitlines()[0]}') from None
  if 'embedding/kernel' not in arrays:
    raise UserError(f'{path} has no embedding/kernel: it is not a released Vision Transformer')
  return flax.traverse_util.unflatten_dict(stack_blocks(arrays, path), sep='/')


def read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  """Names and arrays. Not by np.load, which takes a file that is no zip for a single array or a pickle."""
  with zipfile.ZipFile(path) as file:
    for name in file.namelist():
      with file.open(name) as member:
        yield name.removesuffix('.npy'), np.lib.format.read_array(member, allow_pickle=False).astype(np.float32)


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
    if len(shapes := {array.shape for array in found.values()}) > 1:
      raise UserError(f'{path}: the blocks differ in the shape of {name}: {sorted(shapes)}')
  rest = {name: array for name, array in arrays.items() if not BLOCK.fullmatch(name)}
  stacked = {f'Transformer/encoderblock/{name}': np.stack([found[i] for i in range(depth)]) for name, found in blocks.items()}
  return rest | stacked
