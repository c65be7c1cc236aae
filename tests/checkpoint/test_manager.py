"""Checkpoints are restored bit for bit, and mismatches are errors that name the leaves."""

import dataclasses
import functools
import hashlib
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from vit_jax.checkpoint.manager import CheckpointManager, load_newest_params
from vit_jax.config import Config, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh
from vit_jax.step import abstract_params, init_state

SIZE = (8, 8)


def init_fn(model=ModelConfig(variant='mu/4'), ema=False, tx=None):  # noqa: B008
  model = build_vit(model, 3)
  return functools.partial(
    init_state, 0, model=model, tx=tx or optax.adamw(1e-3), size=SIZE, ema=ema
  )


def abstract_state(init, fsdp=1):
  """Return the shapes of a state with their shardings."""
  shapes = jax.eval_shape(init)
  shardings = state_shardings(shapes, make_mesh(fsdp, batches={}))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def save(path, init, steps=(1,), **kwargs):
  state = jax.jit(init)()
  checkpoints = CheckpointManager(path, **kwargs)
  for step in steps:
    checkpoints.save(state.replace(step=state.step * 0 + step), step)
  checkpoints.close()
  return state


def restore(path, like):
  checkpoints = CheckpointManager(path)
  try:
    restored = checkpoints.restore(like)
    return restored and restored[0]
  finally:
    checkpoints.close()


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize('fsdp', [1, 8])
def test_a_state_is_restored_bit_for_bit_on_any_layout(tmp_path, fsdp):
  init = init_fn(ModelConfig(variant='mu/4', width=256, heads=4, mlp=1024), ema=True)
  state = save(tmp_path, init)
  restored = restore(tmp_path, abstract_state(init, fsdp))
  assert_equal(restored.params, state.params)
  assert_equal(restored.opt_state, state.opt_state)
  assert_equal(restored.ema, state.ema)
  assert int(restored.step) == 1
  wide = restored.params['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel']
  assert wide.sharding.shard_shape(wide.shape)[1:] in {(256, 1024 // fsdp)}


def test_a_state_with_frozen_parameters_is_restored(tmp_path):
  model = build_vit(ModelConfig(variant='mu/4'), 3)
  config = dataclasses.replace(Config().optim, freeze='embedding/.*')
  init = init_fn(tx=make_optimizer(config, lambda step: 0.1, abstract_params(model, SIZE)))
  state = save(tmp_path, init)
  assert_equal(restore(tmp_path, abstract_state(init)).opt_state, state.opt_state)


def test_counters_are_restored_with_the_state_they_were_saved_with(tmp_path):
  init = init_fn()
  state = jax.jit(init)()
  checkpoints = CheckpointManager(tmp_path, max_to_keep=3)
  checkpoints.save(state, 1, {'streak': 2, 'missed': ['eval_every'], 'best': 0.25})
  checkpoints.save(state, 2)
  checkpoints.finish(state, 3, {'streak': 5})
  for step, expected in (
    (3, {'streak': 5}),
    (2, {}),
    (1, {'streak': 2, 'missed': ['eval_every'], 'best': 0.25}),
  ):
    checkpoints = CheckpointManager(tmp_path)
    assert checkpoints.restore(abstract_state(init))[1] == expected
    checkpoints.close()
    shutil.rmtree(tmp_path / 'checkpoints' / str(step))


def edit_manifest(checkpoint, change):
  """Apply `change` to the content of leaves.json."""
  path = checkpoint / 'digest' / 'leaves.json'
  content = change(json.loads(path.read_text(encoding='utf-8')))
  path.write_text(json.dumps(content), encoding='utf-8')


def test_a_checkpoint_from_before_counters_is_restored_with_none(tmp_path):
  def without_counters(content):
    del content['counters'], content['sha256']
    text = json.dumps(content, sort_keys=True)
    return content | {'sha256': hashlib.sha256(text.encode()).hexdigest()}

  init = init_fn()
  save(tmp_path, init)
  edit_manifest(tmp_path / 'checkpoints' / '1', without_counters)
  checkpoints = CheckpointManager(tmp_path)
  state, counters = checkpoints.restore(abstract_state(init))
  checkpoints.close()
  assert int(state.step) == 1 and counters == {}


def test_a_changed_counter_is_damage(tmp_path):
  init = init_fn()
  save(tmp_path, init)
  edit_manifest(
    tmp_path / 'checkpoints' / '1', lambda content: content | {'counters': {'streak': 1}}
  )
  with pytest.raises(UserError, match='checkpoints.* damaged'):
    restore(tmp_path, abstract_state(init))


def test_restore_returns_none_without_checkpoints(tmp_path):
  assert restore(tmp_path, abstract_state(init_fn())) is None


def test_the_newest_checkpoints_and_the_milestones_are_retained(tmp_path):
  save(tmp_path, init_fn(), steps=range(1, 9), max_to_keep=2, keep_every=3)
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == set('3678')


def test_another_architecture_is_an_error_that_lists_the_differing_leaves(tmp_path):
  save(tmp_path, init_fn())
  with pytest.raises(UserError, match=r'Dense_0/bias: float32\[1, 128\] .* float32\[1, 64\]'):
    restore(tmp_path, abstract_state(init_fn(ModelConfig(variant='mu/4', mlp=64))))
  with pytest.raises(UserError, match='ema/.*: none'):
    restore(tmp_path, abstract_state(init_fn(ema=True)))


def test_load_newest_params_returns_the_moving_average(tmp_path):
  init = init_fn(ema=True)
  state = jax.jit(init)()
  state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
  checkpoints = CheckpointManager(tmp_path)
  checkpoints.save(state, 7)
  checkpoints.close()
  params, step = load_newest_params(tmp_path)
  assert step == 7
  assert_equal(params, jax.device_get(state.ema))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
