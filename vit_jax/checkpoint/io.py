"""Read and write one checkpoint with Orbax, and verify it with checksums.

STEP/state/               the arrays
STEP/digest/leaves.json   the manifest: shape, dtype and checksum of each array, counters, a SHA-256
STEP/commit_success.txt   written last; afterwards the directory is renamed to STEP
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.checkpoint.checksum import compute_checksums, format_checksum, leaves_by_path
from vit_jax.checkpoint.event_loop import draining_event_loops
from vit_jax.errors import DivergedError, StorageError, UserError
from vit_jax.runtime.files import (
  name_alias,
  plain_alias,
  read_json_object,
  retry_io,
  summarize_error,
)
from vit_jax.step import TrainState

T = TypeVar('T')

# Seconds. Orbax measures a timeout by the wall clock, which may jump, so this one never expires.
_NO_TIMEOUT = 10**6
MAX_READ_BACK_BYTES = 2**29  # Larger states are read back in part; an array of ViT-L has 400 MB.
_REQUIRED_FILES = (
  'commit_success.txt', '_CHECKPOINT_METADATA', 'digest/leaves.json', 'state/_METADATA',
)  # fmt: skip


class CorruptCheckpointError(UserError):
  """A checkpoint that does not hold what was saved. The message is a short phrase."""


class NonFiniteStateError(DivergedError):
  """A state with non-finite numbers, which is not saved."""


class _ChecksumHandler(ocp.AsyncCheckpointHandler):
  """Write leaves.json beside the arrays. Only a thread of Orbax waits for the checksums."""

  async def async_save(self, directory, args):
    """Return a future of the file. It raises NonFiniteStateError if the state is not finite."""
    future = ocp.future.CommitFutureAwaitingContractedSignals
    return [future(self._save(directory, args), name='digests')]

  async def _save(self, directory, args):
    checksums = jax.device_get(args.checksums)
    _check_state_is_finite(checksums)
    if jax.process_index() == 0:
      content = format_manifest(args.step, args.leaves, checksums, args.counters).encode()
      await asyncio.to_thread(
        retry_io, f'writing {directory}', lambda: (directory / 'leaves.json').write_bytes(content)
      )

  def save(self, directory, args):
    raise NotImplementedError('checkpoints are written in the background')

  def restore(self, directory, args):
    raise NotImplementedError('_read_manifest reads leaves.json')


@ocp.args.register_with_handler(_ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveChecksumsArgs(ocp.args.CheckpointArgs):
  """Content of leaves.json: {path: (shape, dtype)}, {path: checksum on the devices}, counters."""

  step: int
  leaves: dict[str, tuple]
  checksums: dict[str, jax.Array]
  counters: dict


class _ArrayHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's handler, which also remembers the futures of the last save."""

  pending_futures = ()

  async def async_save(self, directory, item=None, save_args=None, args=None):
    """Return the futures of the arrays."""
    self.pending_futures = await super().async_save(directory, item, save_args, args)
    return self.pending_futures


@ocp.args.register_with_handler(_ArrayHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArraysArgs(ocp.args.PyTreeSave):
  """The arrays that `_ArrayHandler` writes."""


class CheckpointWriter:
  """Write checkpoints in the background, one at a time."""

  def __init__(self):
    self._array_handler, self._resources = _ArrayHandler(), contextlib.ExitStack()
    # If creating directories in the background fails, their users wait for them for five minutes.
    options = ocp.AsyncOptions(timeout_secs=_NO_TIMEOUT, create_directories_asynchronously=False)
    composite = ocp.CompositeOptions(async_options=options)
    handlers = ocp.CompositeCheckpointHandler(
      composite_options=composite, state=self._array_handler, digest=_ChecksumHandler()
    )
    self._checkpointer = ocp.AsyncCheckpointer(handlers, async_options=options)

  def save(self, path: Path, state: TrainState, step: int, counters: dict):
    """Copy the state off the devices, and start to write it.

    The checksums are those of the arrays on the devices.
    """
    state = state_to_dict(state)
    leaves, checksums = _leaf_shapes_and_dtypes(state), compute_checksums(state)
    manifest = _SaveChecksumsArgs(step, leaves, checksums, counters)
    self._resources.close()
    self._resources.enter_context(draining_event_loops())
    directory = self._resources.enter_context(plain_alias(path.parent))
    self._checkpointer.save(
      directory / path.name, ocp.args.Composite(state=_SaveArraysArgs(state), digest=manifest)
    )

  def wait(self):
    """Wait until no thread writes any more, and raise the error of a failed save.

    Orbax raises it while others of its threads still write.
    """
    try:
      self._checkpointer.wait_until_finished()
    finally:
      for future in self._array_handler.pending_futures or ():
        with contextlib.suppress(Exception):
          future.result()
      self._resources.close()

  def close(self):
    """End the threads."""
    self._checkpointer.close()


def restore_state(path: Path, like: TrainState) -> tuple[TrainState, dict[str, str], dict]:
  """Return (state, checksums, counters) of a checkpoint; the caller verifies the checksums.

  The state has the shapes and shardings of `like`; `checksums` maps the path of each leaf to its
  expected checksum. Raises CorruptCheckpointError if the checkpoint cannot be read, and UserError
  that lists the differing leaves if it holds another architecture.
  """
  like = state_to_dict(like)
  leaves, counters = _read_manifest(path)
  saved = {name: leaf[:2] for name, leaf in leaves.items()}
  _check_same_architecture(saved, _leaf_shapes_and_dtypes(like), path)
  layout = ocp.checkpoint_utils.construct_restore_args(like)
  state = _restore_arrays(path, leaves, ocp.args.PyTreeRestore(like, restore_args=layout))
  return TrainState(**state), {name: leaf[2] for name, leaf in leaves.items()}, counters


def read_checkpoint_as_numpy(path: Path, *parts: str) -> dict:
  """Return the arrays of a checkpoint as NumPy arrays, by the names of the state's fields.

  With `parts`, return only the first of these fields that is not empty. Raises
  CorruptCheckpointError or NonFiniteStateError if an array is not what was saved.
  """
  leaves, _ = _read_manifest(path)
  tree = _read_tree_metadata(path, leaves)
  parts = [part for part in parts if jax.tree.leaves(tree[part])][:1] or list(tree)
  marks = {part: 0 if part in parts else ocp.PLACEHOLDER for part in tree}
  item = {part: jax.tree.map(lambda _, part=part: marks[part], tree[part]) for part in tree}
  state = _read_verified_arrays(path, leaves, item)
  return {part: state[part] for part in parts}


def _read_verified_arrays(path: Path, leaves: dict[str, tuple], item: dict) -> dict:
  """Return the arrays of the leaves of `item` that are not placeholders, as NumPy arrays."""
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  args = ocp.args.PyTreeRestore(item, restore_args=as_numpy)
  state = _restore_arrays(path, leaves, args)
  # One array at a time, because a device may be too small for all.
  for name, array in leaves_by_path(state).items():
    if array is not ocp.PLACEHOLDER:
      check_checksums({name: array}, {name: leaves[name][2]})
  return state


def check_readable(path: Path):
  """Raise CorruptCheckpointError unless the files, manifest and metadata are there and agree.

  No array is read, and no device is used.
  """
  leaves, _ = _read_manifest(path)
  _read_tree_metadata(path, leaves)


def read_back(path: Path, max_bytes: int = MAX_READ_BACK_BYTES):
  """Read a checkpoint that was just written, and compare it with its manifest.

  Metadata is compared in full. Arrays are read in an order that depends on the step, except those
  that would exceed `max_bytes` together with the ones before. Raises CorruptCheckpointError or
  NonFiniteStateError if they are not what was saved.
  """
  leaves, _ = _read_manifest(path)
  tree = _read_tree_metadata(path, leaves)
  names = list(leaves_by_path(tree))
  chosen = _choose_leaves(random.Random(path.name).sample(names, len(names)), leaves, max_bytes)
  item = [0 if name in chosen else ocp.PLACEHOLDER for name in names]
  _read_verified_arrays(path, leaves, jax.tree.unflatten(jax.tree.structure(tree), item))


def _choose_leaves(names: list[str], leaves: dict[str, tuple], max_bytes: int) -> set[str]:
  """Return the names, in this order, without those that exceed what the earlier ones leave."""
  chosen, left = set(), max_bytes
  for name in names:
    shape, dtype, _ = leaves[name]
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    if size <= left:
      chosen.add(name)
      left -= size
  return chosen


def verify_checkpoint(path: Path) -> str:
  """Return a summary of an intact checkpoint: the number of arrays and their size.

  Raises CorruptCheckpointError or NonFiniteStateError if an array is not what was saved.
  """
  arrays = jax.tree.leaves(read_checkpoint_as_numpy(path))
  return f'{len(arrays)} arrays, {sum(array.nbytes for array in arrays) / 2**20:,.1f} MiB'


def check_checksums(tree, expected: dict[str, str]):
  """Raise CorruptCheckpointError or NonFiniteStateError if arrays are not what was saved.

  All hosts that hold a part of an array have to call it.
  """
  checksums = jax.device_get(compute_checksums(tree))
  differ = [name for name, value in checksums.items() if format_checksum(value) != expected[name]]
  if differ:
    more = f' and {len(differ) - 1} more' if len(differ) > 1 else ''
    raise CorruptCheckpointError(f'{differ[0]}{more}: the checksum differs')
  _check_state_is_finite(checksums)


def _check_state_is_finite(checksums: dict[str, np.ndarray]):
  """Raise NonFiniteStateError if the checksums counted non-finite elements."""
  counts = {name: int(value[2]) for name, value in checksums.items() if value[2]}
  if counts:
    raise NonFiniteStateError(
      f'the state is not finite: {sum(counts.values()):,} elements, first in {next(iter(counts))}'
    )


def format_manifest(
  step: int, leaves: dict[str, tuple], checksums: dict[str, np.ndarray], counters: dict
) -> str:
  """Return the text of leaves.json.

  It holds the step, [shape, dtype, checksum] of each leaf, the counters, and a SHA-256 of all that.
  """
  content = {
    'step': step,
    'leaves': {name: [*leaf, format_checksum(checksums[name])] for name, leaf in leaves.items()},
    'counters': counters,
  }
  return json.dumps(content | {'sha256': _manifest_sha256(content)}, indent=0)


def _read_manifest(path: Path) -> tuple[dict[str, tuple], dict]:
  """Return ({path of a leaf: (shape, dtype, checksum)}, counters) of a checkpoint.

  Raises CorruptCheckpointError if the checkpoint is incomplete or its manifest was changed.
  """
  _check_files(path)
  try:
    content = read_json_object(path / 'digest' / 'leaves.json')
  except StorageError:
    raise
  except UserError:
    raise CorruptCheckpointError('its leaves.json is damaged') from None
  if content.pop('sha256', None) != _manifest_sha256(content):
    raise CorruptCheckpointError('its leaves.json was changed')
  if str(content['step']) != path.name:
    raise CorruptCheckpointError(f'it holds step {content["step"]}')
  leaves = {
    name: (tuple(shape), dtype, checksum)
    for name, (shape, dtype, checksum) in content['leaves'].items()
  }
  return leaves, content.get('counters', {})


def _check_files(path: Path):
  """Raise CorruptCheckpointError if a file is missing or is anything but a regular file.

  Nothing outside the checkpoint is read, and no pipe, which may never end.
  """
  if path.is_symlink():
    raise CorruptCheckpointError('it is a symbolic link')
  if not path.is_dir():
    raise CorruptCheckpointError('it is not a directory')
  for file in path.rglob('*'):
    if file.is_symlink() or not (file.is_file() or file.is_dir()):
      raise CorruptCheckpointError(f'its {file.name} is not a regular file')
  for name in _REQUIRED_FILES:
    if not (path / name).is_file():
      raise CorruptCheckpointError(f'it has no {name}')


def _manifest_sha256(content: dict) -> str:
  """Return the SHA-256 of the content as JSON with sorted keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_tree_metadata(path: Path, leaves: dict[str, tuple]) -> dict:
  """Return the shapes and dtypes of the arrays in a checkpoint, before anything is allocated.

  Raises CorruptCheckpointError if they differ from the manifest.
  """
  tree = _read_with_orbax(path, lambda state: ocp.PyTreeCheckpointHandler().metadata(state).tree)
  if _leaf_shapes_and_dtypes(tree) != {name: leaf[:2] for name, leaf in leaves.items()}:
    raise CorruptCheckpointError('the metadata of its arrays was changed')
  return tree


def _restore_arrays(path: Path, leaves: dict[str, tuple], args: ocp.args.PyTreeRestore) -> dict:
  """Return the arrays that `args` select."""
  _read_tree_metadata(path, leaves)
  return _read_with_orbax(
    path, lambda state: ocp.PyTreeCheckpointHandler().restore(state, args=args)
  )


def _read_with_orbax(path: Path, function: Callable[[Path], T]) -> T:
  """Return `function(state)`, which reads the arrays' directory of a checkpoint.

  Orbax and TensorStore raise the same errors for damage and for failing storage. If reading fails,
  all files are read once: only failing storage prevents that. Raises StorageError for failing
  storage and CorruptCheckpointError for damage.
  """

  def read() -> T:
    with plain_alias(path) as alias, draining_event_loops():
      return function(alias / 'state')

  with contextlib.suppress(Exception):
    return read()
  for file in path.rglob('*'):
    if file.is_file():
      retry_io(f'reading {file}', file.read_bytes)
  try:
    return read()
  except Exception as error:
    reason = name_alias(summarize_error(error), path)
    raise CorruptCheckpointError(f'it cannot be read: {reason}') from None


def state_to_dict(state: TrainState) -> dict:
  """Return the state as {name of a field: value}, so that files do not depend on our classes."""
  return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _leaf_shapes_and_dtypes(tree) -> dict[str, tuple]:
  """Return {path: (shape, dtype)} for a tree of arrays, shapes or Orbax's metadata."""
  return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves_by_path(tree).items()}


def _check_same_architecture(saved: dict[str, tuple], expected: dict[str, tuple], path: Path):
  """Raise UserError that lists the leaves of a checkpoint that differ from the expected ones."""

  def show(leaf: tuple | None) -> str:
    return f'{leaf[1]}{list(leaf[0])}' if leaf else 'none'

  differ = [
    f'{name}: {show(saved.get(name))} there, {show(expected.get(name))} here'
    for name in sorted(saved.keys() | expected.keys())
    if saved.get(name) != expected.get(name)
  ]
  if differ:
    more = f'; and {len(differ) - 5} more' if len(differ) > 5 else ''
    raise UserError(
      f'the checkpoint {path} holds another architecture: ' + '; '.join(differ[:5]) + more
    )
