"""Three promises for every optimizer, for SAM, for distillation and for the losses.

One device equals eight, a batch equals its parts in sequence, and an interrupted run equals one
that was not interrupted. test_equivalence.py proves the first and the last for processes.
"""

import functools
import shutil
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.config import Config, DataConfig, ModelConfig
from vit_jax.config_checks import validate
from vit_jax.settings.fields import with_settings
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import to_global
from vit_jax.step import TrainState
from vit_jax.train import train
from vit_jax.training.program import (
  Program,
  abstract_teacher,
  compile_train_step,
  make_program,
)
from vit_jax.training.task import make_task
from vit_jax.training.teacher import describe_teacher

# Without dropout, of which each part of a batch has its own masks: test_step.py tests it. Keys have
# no bias: its gradient is rounding alone, which Adam and Lion would turn into full steps.
BASE = Config(
  data=DataConfig(
    train='builtin:digits', split='train[:64]', eval_split='test[:32]', batch=16, size=(8, 8)
  ),
  model=ModelConfig(
    variant='mu/4', depth=2, width=32, heads=4, mlp=64, qkv_bias='qv', layer_scale=0.3,
  ),
  mixup=0.2,
  steps=4,
  log_every='1',
  eval_every='0',
  save_every='2',
)  # fmt: skip
COMMON = {
  'optim.lr': 1e-3, 'optim.warmup': '2', 'optim.weight_decay': 0.1, 'optim.grad_clip_norm': 1.0,
  'optim.ema': 0.9, 'optim.weight_decay_mask': '.*/kernel', 'optim.layer_decay': 0.8,
}  # fmt: skip
SGD = COMMON | {'optim.name': 'sgd', 'optim.lr': 0.01}
BCE = {'loss': 'sigmoid', 'sigmoid_reduction': 'mean', 'target_threshold': 0.2}
RECIPES = {
  'sgd': SGD,
  'adamw': COMMON | {'optim.head_weight_decay_factor': 3.0, 'optim.skip_spikes': 50.0},
  'adafactor': COMMON | {'optim.name': 'adafactor'},
  'rmsprop': COMMON | {'optim.name': 'rmsprop', 'optim.coupled_weight_decay': True},
  'lamb': COMMON | {'optim.name': 'lamb'},
  'lion': COMMON | {'optim.name': 'lion', 'optim.lr': 1e-4, 'optim.b2': 0.99},
  'muon': COMMON | {'optim.name': 'muon'},
  'muon, frozen': COMMON | {'optim.name': 'muon', 'optim.freeze': '.*/MlpBlock_3/.*|cls'},
  'sam': SGD | {'optim.sam_rho': 0.1},
  'gsam': COMMON | {
    'optim.sam_rho': 0.3, 'optim.sam_rho_min': 0.05, 'optim.gsam_alpha': 0.6, 'optim.lr_end': 1e-5,
  },
  'sam, adapters': SGD | {
    'optim.sam_rho': 0.1, 'init': 'absent', 'lora.rank': 4, 'optim.weight_decay_mask': '.*',
  },
  'lamb, binary cross-entropy': COMMON | BCE | {'optim.name': 'lamb'},
  'distill': COMMON | {
    'distill.teacher': 'absent', 'distill.variant': 'mu/4', 'distill.temperature': 2.0,
    'distill.weight': 0.7, 'label_smoothing': 0.1, 'cutmix': 1.0,
  },
  'sum over classes': SGD | {'loss': 'sigmoid', 'label_smoothing': 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True, scope='module')
def small_and_quick():
  """Split small parameters over 'fsdp', and compile without optimization, which takes longest."""
  with (
    mock.patch('vit_jax.sharding.fsdp.MIN_SHARDED_SIZE', 256),
    mock.patch(
      'vit_jax.training.program.compiler_options',
      lambda mesh: {'xla_backend_optimization_level': 0},
    ),
  ):
    yield


def config_of(name: str, **settings) -> Config:
  return validate(with_settings(BASE, RECIPES[name] | settings))


def batch_of(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
    'label': rng.integers(0, 10, (16, 1)).astype(np.int32),
    'mask': np.arange(16) != 5,
  }


def draw(shapes: dict, scale: float) -> dict:
  """Return random parameters, none of which is zero."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype), shapes
  )


def draw_constants(program: Program) -> dict:
  """Return the seed and, if the program has one, the parameters of a teacher on its devices."""
  if program.teacher is None:
    return {'seed': np.int32(0)}
  teacher = draw(shapes := abstract_teacher(program), 0.3)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  return {'seed': np.int32(0), 'teacher': jax.device_put(teacher, shardings)}


def draw_state(program: Program) -> TrainState:
  """Return a state of random parameters, none of which is zero, on the devices of the program."""
  params = draw(program.param_shapes, 0.06)
  average = jax.tree.map(np.copy, params)
  state = TrainState(jnp.int32(0), params, jax.jit(program.tx.init)(params), average)
  return jax.device_put(state, state_shardings(state, program.mesh))


@functools.cache
def trained(name: str, devices: int, fsdp: int, parts: int = 1):
  """Train for four steps; return the losses, the first and the last parameters and averages."""
  config = config_of(name, **{'mesh.fsdp': fsdp, 'optim.grad_accum_steps': parts})
  program = make_program(
    *(config, make_task(config)),
    examples=64, classes=10, label_slots=1, devices=jax.devices()[:devices],
    teacher=describe_teacher(config, 10),
  )  # fmt: skip
  state, step, losses = draw_state(program), compile_train_step(program), []
  constants = draw_constants(program)
  first = jax.device_get((state.params, state.ema))
  for k in range(config.steps):
    state, metrics = step(state, to_global(batch_of(k), program.mesh), **constants)
    assert not metrics['not_finite']
    losses.append(float(metrics['loss']))
  return losses, first, jax.device_get((state.params, state.ema))


def assert_same_training(run: tuple, other: tuple):
  """Assert that losses are equal to 1e-5, and parameters to 1e-3 of how far they have moved."""
  (losses, first, last), (other_losses, other_first, other_last) = run, other
  np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
  subtract = lambda a, b: np.concatenate(
    [np.ravel(np.float64(x) - y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
  )
  assert not np.any(subtract(first, other_first))
  moved = np.linalg.norm(subtract(last, first))
  assert moved > 1e-3
  assert np.linalg.norm(subtract(last, other_last)) <= 1e-3 * moved


@pytest.mark.parametrize(
  ('name', 'fsdp'), [*((name, 2) for name in RECIPES), ('lamb', 8), ('muon', 1), ('gsam', 8)]
)
def test_eight_devices_equal_one(name, fsdp):
  assert_same_training(trained(name, 8, fsdp), trained(name, 1, 1))


@pytest.mark.parametrize('name', RECIPES)
def test_four_parts_equal_one(name):
  assert_same_training(trained(name, 1, 1, 4), trained(name, 1, 1))


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> str:
  """Return the directory of a run whose model can have adapters, and can teach."""
  workdir = tmp_path_factory.mktemp('base') / 'run'
  train(config_of('sgd', **{'optim.warmup': '0', 'steps': 1}), workdir)
  return str(workdir)


@pytest.mark.parametrize('name', RECIPES)
def test_an_interrupted_run_equals_another_bit_for_bit(name, base, tmp_path):
  config = config_of(name, **{k: base for k in ('init', 'distill.teacher') if k in RECIPES[name]})
  train(config, tmp_path / 'once')
  interrupted = tmp_path / 'interrupted'
  shutil.copytree(tmp_path / 'once', interrupted, ignore=shutil.ignore_patterns('4'))
  train(config, interrupted)
  ours, theirs = (
    flax.traverse_util.flatten_dict(load_newest_params(path)[0], sep='/')
    for path in (interrupted, tmp_path / 'once')
  )
  assert ours.keys() == theirs.keys()
  assert [path for path in ours if ours[path].tobytes() != theirs[path].tobytes()] == []
