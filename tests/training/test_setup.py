"""A run restores bit for bit the state that another mesh saved, and opens consistent sources."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.training.initial_state import restore_or_init_state
from vit_jax.training.program import abstract_state, make_program
from vit_jax.training.setup import open_sources
from vit_jax.training.task import make_task

# Wide enough that some parameters are split over 'fsdp'.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', size=(8, 8)),
  model=ModelConfig(variant='mu/4', depth=2, width=256, heads=4),
  optim=OptimConfig(ema=0.9),
  steps=1,
)


def start(workdir, devices: int, fsdp: int, save: bool = False):
  """Return (first state, notes) of a run on a mesh of `devices` devices."""
  config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=fsdp))
  program = make_program(
    config,
    make_task(config),
    examples=1297,
    classes=10,
    label_slots=1,
    devices=jax.devices()[:devices],
  )
  checkpoints = CheckpointManager(workdir)
  state, _, notes = restore_or_init_state(program, checkpoints)
  if save:
    checkpoints.save(state.replace(step=state.step + 7), 7)
  checkpoints.close()
  shapes = abstract_state(program)
  assert jax.tree.all(
    jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim), state, shapes)
  )
  return state, notes


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Return (directory, state) of a checkpoint that was sharded over eight devices."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  state, notes = start(workdir, 8, 8, save=True)
  assert notes == [] and int(state.step) == 0
  return workdir, state


@pytest.mark.parametrize(('devices', 'fsdp'), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (8, 8)])
def test_a_checkpoint_of_eight_devices_is_restored_bit_for_bit_on_any_mesh(saved, devices, fsdp):
  workdir, expected = saved
  state, notes = start(workdir, devices, fsdp)
  assert notes == ['resumes after step 7'] and int(state.step) == 7
  same = functools.partial(
    jax.tree.map, lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
  )
  assert jax.tree.all(same(state.replace(step=expected.step), expected))


def test_the_sources_of_a_config_have_the_same_classes():
  train, test = open_sources(CONFIG)
  assert (len(train), len(test)) == (1297, 500) and train.label_names == test.label_names


def test_folders_with_composed_and_decomposed_names_have_the_same_classes(tmp_path):
  for folder, name in (('a', 'caf\u00e9'), ('b', 'cafe\u0301')):
    for split in ('train', 'test'):
      for label in (name, 'zoo'):
        (tmp_path / folder / split / label).mkdir(parents=True)
        (tmp_path / folder / split / label / '1.jpg').touch()
  data = DataConfig(train=f'folder:{tmp_path / "a"}', eval=f'folder:{tmp_path / "b"}')
  train, evaluation = open_sources(dataclasses.replace(CONFIG, data=data))
  assert [train[i][1] for i in range(2)] == [evaluation[i][1] for i in range(2)]
