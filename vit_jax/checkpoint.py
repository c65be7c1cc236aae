"""A run's checkpoints, through Orbax; nobody else imports it. Each lies in WORKDIR/checkpoints/STEP."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.errors import UserError
from vit_jax.step import TrainState


class Checkpoints:
  """The checkpoints of one run: saved in the background, the newest `keep` and every one at a multiple of `keep_every` kept."""

  def __init__(self, workdir: Path, *, keep: int = 1, keep_every: int = 0):
    self._manager = manager(
      workdir, max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )

  def save(self, state: TrainState, step: int):
    """Copies the state off the devices, and writes it while training goes on. A step that is saved already stays."""
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(as_dict(state))), force=True)

  def close(self):
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore(workdir: Path, like: TrainState) -> TrainState | None:
  """The newest state saved in `workdir`, laid out as `like` (shapes with shardings); None where nothing is saved.

  UserError that lists the leaves where the checkpoint holds another architecture.
  """
  if not (workdir / 'checkpoints').is_dir():
    return None
  checkpoints = manager(workdir, create=False)
  step = checkpoints.latest_step()
  if step is None:
    return None
  like = as_dict(like)
  refuse_other_leaves(leaves(saved_tree(checkpoints, step)), leaves(like), workdir / 'checkpoints' / str(step))
  layout = ocp.checkpoint_utils.construct_restore_args(like)
  args = ocp.args.Composite(state=ocp.args.PyTreeRestore(like, restore_args=layout))
  return TrainState(**checkpoints.restore(step, args=args).state)


def manager(workdir: Path, **options) -> ocp.CheckpointManager:
  """Orbax's manager of the checkpoints in `workdir`; each holds one item, `state`."""
  directory = (workdir / 'checkpoints').resolve()
  handlers = {'state': ocp.PyTreeCheckpointHandler()}
  return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers)


def saved_tree(checkpoints: ocp.CheckpointManager, step: int) -> dict:
  """What the checkpoint of `step` holds: shapes and dtypes, no values."""
  return checkpoints.item_metadata(step).state.tree


def load_params(workdir: Path) -> tuple[dict, int]:
  """The parameters (their moving average, if the run keeps one) of the newest checkpoint, as NumPy arrays, and its step.

  UserError where the run has saved nothing yet.
  """
  checkpoints = manager(workdir, create=False)
  step = checkpoints.latest_step()
  if step is None:
    raise UserError(f'{workdir} holds no checkpoint yet')
  tree = saved_tree(checkpoints, step)
  best = 'ema' if tree['ema'] else 'params'
  item = {best: jax.tree.map(lambda _: 0, tree[best])}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  args = ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=as_numpy)
  return checkpoints.restore(step, args=ocp.args.Composite(state=args)).state[best], step


def as_dict(state: TrainState) -> dict:
  """The state by the names of its fields: Orbax's view of it, free of our classes."""
  return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def leaves(tree) -> dict[str, tuple]:
  """{path: (shape, dtype)} of every array in a tree of arrays, shapes or Orbax's metadata."""
  name = lambda key: str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
  return {'/'.join(map(name, keys)): (tuple(leaf.shape), str(leaf.dtype)) for keys, leaf in jax.tree.leaves_with_path(tree)}


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
