"""A run's directory: what the run is (config, preprocessing, labels, versions) and its checkpoints, through Orbax.

    config.json  preprocessing.json  labels.txt  versions.json  metrics.jsonl  tensorboard/  checkpoints/STEP/

Nobody else imports Orbax.
"""

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.config import Config, flat, from_dict, to_dict
from vit_jax.errors import UserError
from vit_jax.step import TrainState

# Settings that may differ when a run goes on: they change what is shown, kept or how fast it goes, and no number.
FREE = {
  'log_every', 'eval_every', 'save_every', 'keep', 'keep_every', 'mesh.fsdp', 'model.remat', 'model.unroll',
  'data.dir', 'data.eval_batch', 'data.workers', 'data.threads', 'data.prefetch',
}  # fmt: skip

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'opencv-python-headless', 'simplejpeg')


def describe(workdir: Path, config: Config, labels: tuple[str, ...]):
  """Writes what the run is, so that whoever has the directory needs nothing else; the first of several hosts does.

  UserError where the directory holds a run with another config (the differing fields are listed) or can't be written.
  """
  try:
    refuse_other_run(workdir, config, labels)
    if jax.process_index():
      return
    workdir.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {'python': platform.python_version()}
    data, model = config.data, config.model
    preprocessing = {
      'size': data.size, 'crop': data.eval_crop, 'short_side': data.eval_short_side, 'mean': model.mean, 'scale': model.scale,
    }  # fmt: skip
    texts = {
      'preprocessing.json': json.dumps(preprocessing, indent=2),
      'labels.txt': '\n'.join(labels),
      'versions.json': json.dumps(versions, indent=2),
      'config.json': json.dumps(to_dict(config), indent=2),  # Last: a directory that has it has all.
    }
    for name, text in texts.items():
      (workdir / f'.{name}').write_text(text + '\n')
      (workdir / f'.{name}').replace(workdir / name)  # Whole or not at all: another host may be reading.
  except OSError as error:
    raise UserError(f'can not write to {workdir}: {error.strerror or error}; choose another --workdir') from None


def refuse_other_run(workdir: Path, config: Config, labels: tuple[str, ...]):
  """UserError where `workdir` holds a run that this one would not continue."""
  if not (workdir / 'config.json').exists():
    return
  old, new = flat(read_config(workdir)), flat(config)
  differ = [f'{name}: {old[name]} there, {new[name]} here' for name in new if name not in FREE and old[name] != new[name]]
  if differ:
    raise UserError(f'{workdir} holds another run; choose another --workdir. The configs differ in ' + '; '.join(differ))
  if read_labels(workdir) != labels:
    raise UserError(f'{workdir} holds a run on other classes than {config.data.train} has now; choose another --workdir')


def read_config(workdir: Path) -> Config:
  """The config of the run in `workdir`. UserError where there is none."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'{workdir} is no run directory: it has no config.json')
  return from_dict(json.loads(path.read_text()))


def read_labels(workdir: Path) -> tuple[str, ...]:
  """The names of the classes of the run in `workdir`, in the order of the logits."""
  return tuple((workdir / 'labels.txt').read_text().splitlines())


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
