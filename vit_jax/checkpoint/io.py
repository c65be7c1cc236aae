"""One checkpoint, as Orbax writes and reads it and as digests prove it; nobody else imports Orbax.

STEP/state/               the arrays
STEP/digest/leaves.json   what they have to be: the shape, dtype and digest of each, and a digest of all that
STEP/commit_success.txt   written last; then the directory gets its name
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.checkpoint.checksum import compute_checksums, format_checksum, leaves_by_path
from vit_jax.errors import DivergedError, StorageError, UserError
from vit_jax.runtime.files import read_json_object, retry_io, summarize_error
from vit_jax.step import TrainState

T = TypeVar('T')

_NO_TIMEOUT = 10**6  # Seconds: Orbax would measure a time-out by the wall clock, which may jump.


class CorruptCheckpointError(UserError):
  """What is wrong with a checkpoint, in half a line."""


class NonFiniteStateError(DivergedError):
  """A state with numbers that are not finite: it is not saved."""


class _ChecksumHandler(ocp.AsyncCheckpointHandler):
  """Writes leaves.json beside the arrays, once the devices have the digests: nobody waits for them but a thread of Orbax's."""

  async def async_save(self, directory, args):
    """A future of the file. NotFinite where the state is not."""
    return [
      ocp.future.CommitFutureAwaitingContractedSignals(self._save(directory, args), name='digests')
    ]

  async def _save(self, directory, args):
    values = jax.device_get(args.values)
    _check_state_is_finite(values)
    if jax.process_index() == 0:
      text = format_manifest(args.step, args.leaves, values, args.counters)
      await asyncio.to_thread(
        retry_io, f'writing {directory}', lambda: (directory / 'leaves.json').write_text(text)
      )

  def save(self, directory, args):
    raise NotImplementedError('checkpoints are written in the background')

  def restore(self, directory, args):
    raise NotImplementedError('read_record reads it')


@ocp.args.register_with_handler(_ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveChecksumsArgs(ocp.args.CheckpointArgs):
  """What `_ChecksumHandler` writes: the digests of a state as they are on the devices, and {path: (shape, dtype)} of its leaves."""

  step: int
  leaves: dict[str, tuple]
  values: dict[str, jax.Array]
  counters: dict


class _ArrayHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's own, which keeps in mind what it has begun."""

  begun = ()

  async def async_save(self, directory, item=None, save_args=None, args=None):
    """The futures of the arrays."""
    self.begun = await super().async_save(directory, item, save_args, args)
    return self.begun


@ocp.args.register_with_handler(_ArrayHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArraysArgs(ocp.args.PyTreeSave):
  """What `_ArrayHandler` writes."""


class CheckpointWriter:
  """Writes checkpoints in the background, one after another."""

  def __init__(self):
    self._arrays = _ArrayHandler()
    # Directories made in the background, when that fails, are waited for by what goes into them, for five minutes.
    options = ocp.AsyncOptions(timeout_secs=_NO_TIMEOUT, create_directories_asynchronously=False)
    composite = ocp.CompositeOptions(async_options=options)
    handlers = ocp.CompositeCheckpointHandler(
      composite_options=composite, state=self._arrays, digest=_ChecksumHandler()
    )
    self._checkpointer = ocp.AsyncCheckpointer(handlers, async_options=options)

  def save(self, path: Path, state: TrainState, step: int, counters: dict):
    """Copies the state off the devices; it is written, and digested as it was on them, while training goes on."""
    state = state_to_dict(state)
    digest = _SaveChecksumsArgs(
      step, _leaf_shapes_and_dtypes(state), compute_checksums(state), counters
    )
    self._checkpointer.save(
      path.resolve(), ocp.args.Composite(state=_SaveArraysArgs(state), digest=digest)
    )

  def wait(self):
    """Returns when nobody writes any more, or raises what went wrong: Orbax does so while others of its threads still write."""
    try:
      self._checkpointer.wait_until_finished()
    finally:
      for future in self._arrays.begun or ():
        with contextlib.suppress(Exception):
          future.result()

  def close(self):
    """Ends its threads."""
    self._checkpointer.close()


def restore_state(path: Path, like: TrainState) -> tuple[TrainState, dict[str, str], dict]:
  """Return (state, checksums, counters) of a checkpoint; the caller verifies the checksums.

  The state has the shapes and shardings of `like`; `checksums` maps the path of each leaf to its expected checksum.
  Raises CorruptCheckpointError if it can't be read, and UserError that lists the leaves of another architecture.
  """
  like = state_to_dict(like)
  record, counters = _read_manifest(path)
  _check_same_architecture(
    {name: leaf[:2] for name, leaf in record.items()}, _leaf_shapes_and_dtypes(like), path
  )
  layout = ocp.checkpoint_utils.construct_restore_args(like)
  state = _restore_arrays(path, record, ocp.args.PyTreeRestore(like, restore_args=layout))
  return TrainState(**state), {name: leaf[2] for name, leaf in record.items()}, counters


def read_checkpoint_as_numpy(path: Path, *parts: str) -> dict:
  """What is in a checkpoint, or only its first `parts` that are not empty, as NumPy arrays by the names of its fields.

  Damaged where a shape, dtype, digest or number is not what it has to be.
  """
  record, _ = _read_manifest(path)
  tree = _read_tree_metadata(path, record)
  parts = [part for part in parts if jax.tree.leaves(tree[part])][:1] or list(tree)
  item = {part: jax.tree.map(lambda _: 0, tree[part]) for part in parts}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  state = _restore_arrays(
    path, record, ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=as_numpy)
  )
  for name, array in leaves_by_path(
    state
  ).items():  # One by one: they need not all fit on a device.
    check_checksums({name: array}, {name: record[name][2]})
  return state


def verify_checkpoint(path: Path) -> str:
  """What a checkpoint holds, in words. Damaged or NotFinite where that is not what was saved."""
  arrays = jax.tree.leaves(read_checkpoint_as_numpy(path))
  return f'{len(arrays)} arrays, {sum(array.nbytes for array in arrays) / 2**20:,.1f} MiB'


def check_checksums(tree, expected: dict[str, str]):
  """Damaged where the arrays are not what was saved. Those over several hosts are looked at by all of them together."""
  values = jax.device_get(compute_checksums(tree))
  differ = [name for name, value in values.items() if format_checksum(value) != expected[name]]
  if differ:
    more = f' and {len(differ) - 1} more' if len(differ) > 1 else ''
    raise CorruptCheckpointError(f'{differ[0]}{more}: the digest differs')
  _check_state_is_finite(values)


def _check_state_is_finite(values: dict[str, np.ndarray]):
  """NotFinite where digests counted elements that are not."""
  bad = {name: int(value[2]) for name, value in values.items() if value[2]}
  if bad:
    raise NonFiniteStateError(
      f'the state is not finite: {sum(bad.values()):,} elements, first in {next(iter(bad))}'
    )


def format_manifest(
  step: int, leaves: dict[str, tuple], values: dict[str, np.ndarray], counters: dict
) -> str:
  """Return the text of leaves.json: [shape, dtype, checksum] of each leaf, the counters, and a SHA-256 of all that."""
  content = {
    'step': step,
    'leaves': {name: [*leaf, format_checksum(values[name])] for name, leaf in leaves.items()},
    'counters': counters,
  }
  return json.dumps(content | {'sha256': _manifest_sha256(content)}, indent=0)


def _read_manifest(path: Path) -> tuple[dict[str, tuple], dict]:
  """Return ({path of a leaf: (shape, dtype, checksum)}, counters) of a checkpoint.

  Raises CorruptCheckpointError if the checkpoint is incomplete or its manifest was changed.
  """
  if path.is_symlink() or not path.is_dir():
    raise CorruptCheckpointError(
      'it is a symbolic link' if path.is_symlink() else 'it is no directory'
    )
  for file in path.rglob('*'):
    if file.is_symlink() or not (file.is_file() or file.is_dir()):
      raise CorruptCheckpointError(
        f'its {file.name} is no file'
      )  # Nothing outside is read, and nothing that never ends.
  for name in (
    'commit_success.txt',
    '_CHECKPOINT_METADATA',
    'digest/leaves.json',
    'state/_METADATA',
  ):
    if not (path / name).is_file():
      raise CorruptCheckpointError(f'it has no {name}')
  try:
    content = read_json_object(path / 'digest' / 'leaves.json')
  except StorageError:
    raise
  except UserError:
    raise CorruptCheckpointError('its leaves.json is damaged') from None
  if content.pop('sha256', None) != _manifest_sha256(content):
    raise CorruptCheckpointError('its leaves.json was changed')
  if str(content['step']) != path.name:
    raise CorruptCheckpointError(f'it is of step {content["step"]}')
  leaves = {
    name: (tuple(shape), dtype, digest)
    for name, (shape, dtype, digest) in content['leaves'].items()
  }
  return leaves, content.get('counters', {})


def _manifest_sha256(content: dict) -> str:
  """Of what JSON says of it."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_tree_metadata(path: Path, record: dict[str, tuple]) -> dict:
  """Shapes and dtypes of what a checkpoint holds. Damaged where they are not those of the record: nothing is allocated yet."""
  tree = _read_with_orbax(
    path, lambda: ocp.PyTreeCheckpointHandler().metadata(path.resolve() / 'state').tree
  )
  if _leaf_shapes_and_dtypes(tree) != {name: leaf[:2] for name, leaf in record.items()}:
    raise CorruptCheckpointError('the metadata of its arrays was changed')
  return tree


def _restore_arrays(path: Path, record: dict[str, tuple], args: ocp.args.PyTreeRestore) -> dict:
  """The arrays that `args` ask for."""
  _read_tree_metadata(path, record)
  return _read_with_orbax(
    path, lambda: ocp.PyTreeCheckpointHandler().restore(path.resolve() / 'state', args=args)
  )


def _read_with_orbax(path: Path, function: Callable[[], T]) -> T:
  """`function()`, which reads a checkpoint: Damaged where what is in it is wrong, StorageError where the storage is."""
  try:
    return function()
  except (
    Exception
  ):  # Orbax and TensorStore raise all kinds of errors, of damage and of storage alike …
    for file in path.rglob('*'):
      if file.is_file():
        retry_io(
          f'reading {file}', file.read_bytes
        )  # … and only storage keeps a file's bytes from us.
  try:
    return function()
  except Exception as error:
    raise CorruptCheckpointError(f'it can not be read: {summarize_error(error)}') from None


def state_to_dict(state: TrainState) -> dict:
  """The state by the names of its fields: Orbax's view of it, free of our classes."""
  return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _leaf_shapes_and_dtypes(tree) -> dict[str, tuple]:
  """{path: (shape, dtype)} of every array in a tree of arrays, shapes or Orbax's metadata."""
  return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves_by_path(tree).items()}


def _check_same_architecture(got: dict[str, tuple], expected: dict[str, tuple], where: Path):
  """UserError that lists the differing leaves, if any."""
  show = lambda leaf: f'{leaf[1]}{list(leaf[0])}' if leaf else 'none'
  differ = [
    f'{name}: {show(got.get(name))} there, {show(expected.get(name))} here'
    for name in sorted(got.keys() | expected.keys())
    if got.get(name) != expected.get(name)
  ]
  if differ:
    more = f'; and {len(differ) - 5} more' if len(differ) > 5 else ''
    raise UserError(
      f'the checkpoint {where} holds another architecture: ' + '; '.join(differ[:5]) + more
    )
