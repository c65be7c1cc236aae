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

from vit_jax.checkpoint.checksum import digests, in_words, named
from vit_jax.errors import DivergedError, StorageError, UserError
from vit_jax.runtime.files import insist, read_object, reason
from vit_jax.step import TrainState

T = TypeVar('T')

NEVER = 10**6  # Seconds: Orbax would measure a time-out by the wall clock, which may jump.


class Damaged(UserError):  # noqa: N818 -- it reads as what it is.
  """What is wrong with a checkpoint, in half a line."""


class NotFinite(DivergedError):  # noqa: N818 -- it reads as what it is.
  """A state with numbers that are not finite: it is not saved."""


class Digests(ocp.AsyncCheckpointHandler):
  """Writes leaves.json beside the arrays, once the devices have the digests: nobody waits for them but a thread of Orbax's."""

  async def async_save(self, directory, args):
    """A future of the file. NotFinite where the state is not."""
    return [ocp.future.CommitFutureAwaitingContractedSignals(self._save(directory, args), name='digests')]

  async def _save(self, directory, args):
    values = jax.device_get(args.values)
    refuse_not_finite(values)
    if jax.process_index() == 0:
      text = record_text(args.step, args.leaves, values)
      await asyncio.to_thread(insist, f'writing {directory}', lambda: (directory / 'leaves.json').write_text(text))

  def save(self, directory, args):
    raise NotImplementedError('checkpoints are written in the background')

  def restore(self, directory, args):
    raise NotImplementedError('read_record reads it')


@ocp.args.register_with_handler(Digests, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveDigests(ocp.args.CheckpointArgs):
  """What `Digests` writes: the digests of a state as they are on the devices, and {path: (shape, dtype)} of its leaves."""

  step: int
  leaves: dict[str, tuple]
  values: dict[str, jax.Array]


class Arrays(ocp.PyTreeCheckpointHandler):
  """Orbax's own, which keeps in mind what it has begun."""

  begun = ()

  async def async_save(self, directory, item=None, save_args=None, args=None):
    """The futures of the arrays."""
    self.begun = await super().async_save(directory, item, save_args, args)
    return self.begun


@ocp.args.register_with_handler(Arrays, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveArrays(ocp.args.PyTreeSave):
  """What `Arrays` writes."""


class Writer:
  """Writes checkpoints in the background, one after another."""

  def __init__(self):
    self._arrays = Arrays()
    # Directories made in the background, when that fails, are waited for by what goes into them, for five minutes.
    options = ocp.AsyncOptions(timeout_secs=NEVER, create_directories_asynchronously=False)
    composite = ocp.CompositeOptions(async_options=options)
    handlers = ocp.CompositeCheckpointHandler(composite_options=composite, state=self._arrays, digest=Digests())
    self._checkpointer = ocp.AsyncCheckpointer(handlers, async_options=options)

  def save(self, path: Path, state: TrainState, step: int):
    """Copies the state off the devices; it is written, and digested as it was on them, while training goes on."""
    state = as_dict(state)
    digest = SaveDigests(step, leaves(state), digests(state))
    self._checkpointer.save(path.resolve(), ocp.args.Composite(state=SaveArrays(state), digest=digest))

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


def read_state(path: Path, like: TrainState) -> tuple[TrainState, dict[str, str]]:
  """(the state in a checkpoint, laid out as `like`, which has shapes and shardings; the digests it has to have).

  Damaged where it can't be; UserError that lists the leaves where it holds another architecture.
  """
  like = as_dict(like)
  record = read_record(path)
  refuse_other_leaves({name: leaf[:2] for name, leaf in record.items()}, leaves(like), path)
  layout = ocp.checkpoint_utils.construct_restore_args(like)
  state = read_arrays(path, record, ocp.args.PyTreeRestore(like, restore_args=layout))
  return TrainState(**state), {name: leaf[2] for name, leaf in record.items()}


def read_whole(path: Path, *parts: str) -> dict:
  """What is in a checkpoint, or only its first `parts` that are not empty, as NumPy arrays by the names of its fields.

  Damaged where a shape, dtype, digest or number is not what it has to be.
  """
  record = read_record(path)
  tree = saved_tree(path, record)
  parts = [part for part in parts if jax.tree.leaves(tree[part])][:1] or list(tree)
  item = {part: jax.tree.map(lambda _: 0, tree[part]) for part in parts}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  state = read_arrays(path, record, ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=as_numpy))
  for name, array in named(state).items():  # One by one: they need not all fit on a device.
    refuse_other_digests({name: array}, {name: record[name][2]})
  return state


def examine(path: Path) -> str:
  """What a checkpoint holds, in words. Damaged or NotFinite where that is not what was saved."""
  arrays = jax.tree.leaves(read_whole(path))
  return f'{len(arrays)} arrays, {sum(array.nbytes for array in arrays) / 2**20:,.1f} MiB'


def refuse_other_digests(tree, expected: dict[str, str]):
  """Damaged where the arrays are not what was saved. Those over several hosts are looked at by all of them together."""
  values = jax.device_get(digests(tree))
  differ = [name for name, value in values.items() if in_words(value) != expected[name]]
  if differ:
    more = f' and {len(differ) - 1} more' if len(differ) > 1 else ''
    raise Damaged(f'{differ[0]}{more}: the digest differs')
  refuse_not_finite(values)


def refuse_not_finite(values: dict[str, np.ndarray]):
  """NotFinite where digests counted elements that are not."""
  bad = {name: int(value[2]) for name, value in values.items() if value[2]}
  if bad:
    raise NotFinite(f'the state is not finite: {sum(bad.values()):,} elements, first in {next(iter(bad))}')


def record_text(step: int, leaves: dict[str, tuple], values: dict[str, np.ndarray]) -> str:
  """leaves.json: [shape, dtype, digest] of each leaf, and what proves that nothing in it was changed."""
  content = {'step': step, 'leaves': {name: [*leaf, in_words(values[name])] for name, leaf in leaves.items()}}
  return json.dumps(content | {'sha256': sha256(content)}, indent=0)


def read_record(path: Path) -> dict[str, tuple]:
  """{path of a leaf: (shape, dtype, digest)} of a checkpoint. Damaged where it was not wholly written, or it was changed."""
  if path.is_symlink() or not path.is_dir():
    raise Damaged('it is a symbolic link' if path.is_symlink() else 'it is no directory')
  for file in path.rglob('*'):
    if file.is_symlink() or not (file.is_file() or file.is_dir()):
      raise Damaged(f'its {file.name} is no file')  # Nothing outside is read, and nothing that never ends.
  for name in ('commit_success.txt', '_CHECKPOINT_METADATA', 'digest/leaves.json', 'state/_METADATA'):
    if not (path / name).is_file():
      raise Damaged(f'it has no {name}')
  try:
    content = read_object(path / 'digest' / 'leaves.json')
  except StorageError:
    raise
  except UserError:
    raise Damaged('its leaves.json is damaged') from None
  if content.pop('sha256', None) != sha256(content):
    raise Damaged('its leaves.json was changed')
  if str(content['step']) != path.name:
    raise Damaged(f'it is of step {content["step"]}')
  return {name: (tuple(shape), dtype, digest) for name, (shape, dtype, digest) in content['leaves'].items()}


def sha256(content: dict) -> str:
  """Of what JSON says of it."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved_tree(path: Path, record: dict[str, tuple]) -> dict:
  """Shapes and dtypes of what a checkpoint holds. Damaged where they are not those of the record: nothing is allocated yet."""
  tree = read(path, lambda: ocp.PyTreeCheckpointHandler().metadata(path.resolve() / 'state').tree)
  if leaves(tree) != {name: leaf[:2] for name, leaf in record.items()}:
    raise Damaged('the metadata of its arrays was changed')
  return tree


def read_arrays(path: Path, record: dict[str, tuple], args: ocp.args.PyTreeRestore) -> dict:
  """The arrays that `args` ask for."""
  saved_tree(path, record)
  return read(path, lambda: ocp.PyTreeCheckpointHandler().restore(path.resolve() / 'state', args=args))


def read(path: Path, function: Callable[[], T]) -> T:
  """`function()`, which reads a checkpoint: Damaged where what is in it is wrong, StorageError where the storage is."""
  try:
    return function()
  except Exception:  # Orbax and TensorStore raise all kinds of errors, of damage and of storage alike …
    for file in path.rglob('*'):
      if file.is_file():
        insist(f'reading {file}', file.read_bytes)  # … and only storage keeps a file's bytes from us.
  try:
    return function()
  except Exception as error:
    raise Damaged(f'it can not be read: {reason(error)}') from None


def as_dict(state: TrainState) -> dict:
  """The state by the names of its fields: Orbax's view of it, free of our classes."""
  return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def leaves(tree) -> dict[str, tuple]:
  """{path: (shape, dtype)} of every array in a tree of arrays, shapes or Orbax's metadata."""
  return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named(tree).items()}


def refuse_other_leaves(got: dict[str, tuple], expected: dict[str, tuple], where: Path):
  """UserError that lists the differing leaves, if any."""
  show = lambda leaf: f'{leaf[1]}{list(leaf[0])}' if leaf else 'none'
  differ = [
    f'{name}: {show(got.get(name))} there, {show(expected.get(name))} here'
    for name in sorted(got.keys() | expected.keys())
    if got.get(name) != expected.get(name)
  ]
  if differ:
    more = f'; and {len(differ) - 5} more' if len(differ) > 5 else ''
    raise UserError(f'the checkpoint {where} holds another architecture: ' + '; '.join(differ[:5]) + more)
