"""What is saved comes back bit for bit, and what does not fit is refused by name."""

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


def begin(model=ModelConfig(variant='mu/4'), ema=False, tx=None):  # noqa: B008
  model = build_vit(model, 3)
  return functools.partial(
    init_state, 0, model=model, tx=tx or optax.adamw(1e-3), size=SIZE, ema=ema
  )


def laid_out(init, fsdp=1):
  """The shapes of a state with their shardings."""
  shapes = jax.eval_shape(init)
  shardings = state_shardings(shapes, make_mesh(fsdp, batches={}))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def saved(path, init, steps=(1,), **kwargs):
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
def test_a_state_comes_back_bit_for_bit_on_any_layout(tmp_path, fsdp):
  init = begin(ModelConfig(variant='mu/4', width=256, heads=4, mlp=1024), ema=True)
  state = saved(tmp_path, init)
  back = restore(tmp_path, laid_out(init, fsdp))
  assert_equal(back.params, state.params)
  assert_equal(back.opt_state, state.opt_state)
  assert_equal(back.ema, state.ema)
  assert int(back.step) == 1
  wide = back.params['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel']
  assert wide.sharding.shard_shape(wide.shape)[1:] in {(256, 1024 // fsdp)}


def test_a_state_with_frozen_parameters_comes_back(tmp_path):
  model = build_vit(ModelConfig(variant='mu/4'), 3)
  config = dataclasses.replace(Config().optim, freeze='embedding/.*')
  init = begin(tx=make_optimizer(config, lambda step: 0.1, abstract_params(model, SIZE)))
  state = saved(tmp_path, init)
  assert_equal(restore(tmp_path, laid_out(init)).opt_state, state.opt_state)


def test_counters_are_restored_with_the_state_they_were_saved_with(tmp_path):
  init = begin()
  state = jax.jit(init)()
  checkpoints = CheckpointManager(tmp_path, keep=3)
  checkpoints.save(state, 1, {'streak': 2, 'missed': ['eval_every'], 'best': 0.25})
  checkpoints.save(state, 2)
  checkpoints.finish(state, 3, {'streak': 5})
  for step, expected in (
    (3, {'streak': 5}),
    (2, {}),
    (1, {'streak': 2, 'missed': ['eval_every'], 'best': 0.25}),
  ):
    checkpoints = CheckpointManager(tmp_path)
    assert checkpoints.restore(laid_out(init))[1] == expected
    checkpoints.close()
    shutil.rmtree(tmp_path / 'checkpoints' / str(step))


def edit_manifest(checkpoint, change):
  """Change leaves.json in place, and its checksum where it holds one."""
  path = checkpoint / 'digest' / 'leaves.json'
  content = change(json.loads(path.read_text()))
  path.write_text(json.dumps(content))


def test_a_checkpoint_from_before_counters_is_restored_with_none(tmp_path):
  def without_counters(content):
    del content['counters'], content['sha256']
    text = json.dumps(content, sort_keys=True)
    return content | {'sha256': hashlib.sha256(text.encode()).hexdigest()}

  init = begin()
  saved(tmp_path, init)
  edit_manifest(tmp_path / 'checkpoints' / '1', without_counters)
  checkpoints = CheckpointManager(tmp_path)
  state, counters = checkpoints.restore(laid_out(init))
  checkpoints.close()
  assert int(state.step) == 1 and counters == {}


def test_a_changed_counter_is_damage(tmp_path):
  init = begin()
  saved(tmp_path, init)
  edit_manifest(
    tmp_path / 'checkpoints' / '1', lambda content: content | {'counters': {'streak': 1}}
  )
  with pytest.raises(UserError, match='none of the checkpoints'):
    restore(tmp_path, laid_out(init))


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert restore(tmp_path, laid_out(begin())) is None


def test_the_newest_and_the_multiples_are_kept(tmp_path):
  saved(tmp_path, begin(), steps=range(1, 9), keep=2, keep_every=3)
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == set('3678')


def test_another_architecture_is_refused_with_the_leaves_that_differ(tmp_path):
  saved(tmp_path, begin())
  with pytest.raises(
    UserError, match=r'Dense_0/bias: float32\[1, 128\] there, float32\[1, 64\] here'
  ):
    restore(tmp_path, laid_out(begin(ModelConfig(variant='mu/4', mlp=64))))
  with pytest.raises(UserError, match='another architecture: ema/.*: none there'):
    restore(tmp_path, laid_out(begin(ema=True)))


def test_the_parameters_alone_are_the_moving_average_where_there_is_one(tmp_path):
  init = begin(ema=True)
  state = jax.jit(init)()
  state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
  checkpoints = CheckpointManager(tmp_path)
  checkpoints.save(state, 7)
  checkpoints.close()
  params, step = load_newest_params(tmp_path)
  assert step == 7
  assert_equal(params, jax.device_get(state.ema))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
