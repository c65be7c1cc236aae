"""Choose the weights among the files of a model, and recognize a file by its first bytes."""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vit_jax.errors import UserError

# Weights in the order of preference, then the shards of the first. Files of the same format with
# other names are copies in other precisions, or other parts of a pipeline.
SAFETENSORS_FILES = ('model.safetensors', 'open_clip_model.safetensors')
TORCH_FILE = 'pytorch_model.bin'
# The variant of a shard is before or after its numbers, depending on the version of transformers.
SHARD_PATTERN = re.compile(r'(.+)-(\d{5})-of-(\d{5})(\.\w+)?\.safetensors')
# Variants of a file that are copies of it in another precision: model.fp16.safetensors.
PRECISION_SUFFIX = re.compile(r'\.(fp|bf|f|float|bfloat|int|uint)(4|8|16|32)')
LEGACY_TORCH_MAGIC = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e')  # torch.save before 1.6.
_FIRST_BYTES = 512


class ForeignFile(NamedTuple):
  """A kind of file that `load` does not read."""

  kind: str  # 'an HDF5 file (Keras weights)'.
  remedy: str  # What to do instead.


FOREIGN_FILES: dict[bytes, ForeignFile] = {
  b'\x89HDF\r\n\x1a\n': ForeignFile(
    'an HDF5 file (Keras weights)', 'use the safetensors or PyTorch file of the same model'
  ),
  b'version https://git-lfs': ForeignFile(
    'a Git LFS pointer, not the file that it stands for', 'run `git lfs pull` in its repository'
  ),
  b'<!doctype html': ForeignFile(
    'a web page', 'the address needs a login, or is that of a page about the file'
  ),
  b'<html': ForeignFile(
    'a web page', 'the address needs a login, or is that of a page about the file'
  ),
  b'\x1f\x8b': ForeignFile('a gzip archive', 'unpack it first'),
  b'\xfd7zxz\0': ForeignFile('an xz archive', 'unpack it first'),
  b'\x28\xb5\x2f\xfd': ForeignFile('a zstd archive', 'unpack it first'),
  b'\x80': ForeignFile(
    'a Python pickle, which can run code when it is read',
    'load it where you trust it, and save its arrays with safetensors.numpy.save_file',
  ),
}


def choose_weights(files: list[str], source: str) -> list[str]:
  """Return the weights among the files at the top of a directory: one file, or all shards.

  Safetensors come before PyTorch's format, and a model before its copies in other precisions.
  Raises UserError if there are no weights, if a shard is missing, or if it is not clear which.
  """
  top = [file for file in files if '/' not in file]
  for file in SAFETENSORS_FILES:
    if file in top:
      return [file]
  models = group_weights(top)
  models = {name: group for name, group in models.items() if not is_copy(name, models)}
  if 'model.safetensors' in models:
    models = {'model.safetensors': models['model.safetensors']}
  if len(models) == 1:
    ((name, group),) = models.items()
    check_all_shards(name, group, source)
    return group
  if TORCH_FILE in top and not models:
    return [TORCH_FILE]
  if models:
    raise UserError(f'{source} has several weights: {", ".join(models)}. Load one by its path')
  listed, formats = ', '.join(sorted(files)[:12]) or 'none', f'.safetensors, .npz or {TORCH_FILE}'
  raise UserError(f'{source} has no weights that load reads ({formats}); its files: {listed}')


def group_weights(files: list[str]) -> dict[str, list[str]]:
  """Return {name: files} of each model. Shards are grouped under the name without their numbers."""
  models = {}
  for file in sorted(files):
    if match := SHARD_PATTERN.fullmatch(file):
      models.setdefault(f'{match[1]}{match[4] or ""}.safetensors', []).append(file)
    elif PurePosixPath(file).suffix in ('.safetensors', '.npz'):
      models[file] = [file]  # One file instead of its shards, whose names sort before it.
  return models


def is_copy(name: str, models: Collection[str]) -> bool:
  """Return whether a model is another one of `models` in another precision."""
  stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
  precision = PurePosixPath(stem).suffix
  is_variant = PRECISION_SUFFIX.fullmatch(precision) is not None
  return is_variant and stem.removesuffix(precision) + suffix in models


def check_all_shards(name: str, group: list[str], source: str):
  """Raise UserError unless the shards of a model are complete, and of one way to split it."""
  matches = [match for file in group if (match := SHARD_PATTERN.fullmatch(file))]
  totals = {match[3] for match in matches}
  expected = range(1, int(max(totals, default='0')) + 1)
  missing = set(expected) - {int(match[2]) for match in matches}
  if len(totals) > 1 or missing:
    what = f'shard {min(missing)} is missing' if missing else 'shards of several ways to split it'
    raise UserError(f'{source}: {name} has {len(group)} files, but {what}')


def is_legacy_torch_file(path: Path) -> bool:
  """Return whether a file was written by `torch.save` before version 1.6."""
  return _first_bytes(path).startswith(LEGACY_TORCH_MAGIC)


def check_regular_file(path: Path):
  """Raise UserError for a device, a pipe or a socket, which might be read for ever."""
  if not path.is_file():
    raise UserError(f'{path} is not a regular file')


def check_file_kind(path: Path):
  """Raise UserError if the first bytes of a file are those of a kind that `load` does not read."""
  start = _first_bytes(path)
  if not start:
    raise UserError(f'{path} is empty')
  if start[8:9] == b'{':  # Safetensors: the length of the header, which may be any bytes, and JSON.
    return
  text = start.removeprefix(b'\xef\xbb\xbf').lstrip().lower()
  for magic, foreign in FOREIGN_FILES.items():
    if start.startswith(magic) or text.startswith(magic):
      raise UserError(f'{path} is {foreign.kind}: {foreign.remedy}')


def _first_bytes(path: Path) -> bytes:
  with path.open('rb') as file:
    return file.read(_FIRST_BYTES)
