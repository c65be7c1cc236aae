"""Blocks of newer models train, split over devices, and run in every kernel.

test_vit.py compares their numbers with NumPy, and tests/pretrained/test_parity.py with timm and
transformers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tests.models.test_axial import train_one_step
from tests.models.test_vit import (
  CLASSES,
  SIZE,
  SMALL,
  assert_same_arrays,
  gradients,
  images,
  jit,
  random_params,
)
from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.models.rope import RotaryPositions
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.step import abstract_params, init_state, train_step

# Settings, and the parameters that they add or remove.
BLOCKS = {
  'RoPE': ({'position': 'rope'}, {'-posembed_input'}),
  'SwiGLU': ({'swiglu': True}, {'+MlpBlock_3/Gate'}),
  'LayerScale': ({'layer_scale': 0.1}, {'+attention_scale', '+mlp_scale'}),
  'norms of queries and keys': ({'qk_norm': True}, {'+query_norm', '+key_norm'}),
  'a norm before the blocks': ({'pre_norm': True}, {'+pre_norm'}),
  'a norm after pooling': ({'pool': 'gap', 'fc_norm': True}, {'+fc_norm', '-encoder_norm', '-cls'}),
  'a class token that is not pooled': ({'pool': 'gap', 'class_token': True}, set()),
  'a distillation token': ({'distillation_token': True}, {'+dist'}),
  'relative positions of BEiT': (
    {'position': 'relative2d'},
    {'+relative/table', '-posembed_input'},
  ),
  'learned and rotary positions': ({'position': 'learned+rope', 'rope_grid': 4}, set()),
  'a norm inside the MLP': ({'mlp_norm': True}, {'+hidden_norm'}),
  'RMSNorm': (
    {'norm': 'rmsnorm'},
    {'-LayerNorm_0/bias', '-LayerNorm_2/bias', '-encoder_norm/bias'},
  ),
  'no biases': (
    {'qkv_bias': 'none', 'patch_bias': False},
    {'-query/bias', '-key/bias', '-value/bias', '-embedding/bias'},
  ),
  'quick GELU': ({'gelu': 'quick'}, set()),
}
ALL = {
  'position': 'rope', 'swiglu': True, 'layer_scale': 0.1, 'qk_norm': True, 'pre_norm': True,
  'fc_norm': True, 'pool': 'gap', 'class_token': True, 'qkv_bias': 'qv', 'patch_bias': False,
  'registers': 2,
}  # fmt: skip


@pytest.mark.parametrize(('fields', 'arrays'), BLOCKS.values(), ids=BLOCKS)
def test_two_steps_change_every_array_of_every_block(fields, arrays):
  config = ModelConfig(**SMALL | fields)
  model, lr = build_vit(config, CLASSES), optax.constant_schedule(0.1)
  tx = make_optimizer(OptimConfig(name='sgd', lr=0.1), lr, abstract_params(model, SIZE))
  state = jit(lambda: init_state(0, model=model, tx=tx, size=SIZE, ema=False))()
  label = np.arange(3)[:, None] % CLASSES
  batch = {'image': images(), 'label': label, 'mask': np.ones(3, bool)}
  step = jit(
    lambda s: train_step(s, batch, model=model, tx=tx, loss=softmax_loss, lr=lr, seed=0)[0]
  )
  before = flatten_dict(jax.device_get(state.params), sep='/')
  after = flatten_dict(jax.device_get(step(step(state)).params), sep='/')
  plain = flatten_dict(abstract_params(build_vit(ModelConfig(**SMALL), CLASSES), SIZE), sep='/')
  added, removed = before.keys() - plain.keys(), plain.keys() - before.keys()
  for sign, names in (('+', added), ('-', removed)):
    expected = {name[1:] for name in arrays if name[0] == sign}
    assert {part for part in expected if any(part in name for name in names)} == expected
    assert all(any(part in name for part in expected) for name in names)
  for name, array in before.items():
    # Without RoPE or a norm, a bias of the keys adds the same to all scores of a query.
    if name.endswith('key/bias') and not (config.has_rope or config.qk_norm):
      continue
    blocks = array.shape[0] if 'encoderblock' in name else 1
    moved = (before[name] != after[name]).reshape(blocks, -1).any(axis=1)
    assert moved.all(), name


# The blocks that ALL has not.
NEWEST = {
  'position': 'learned+rope', 'rope_grid': 4, 'rope_register_theta': 50.0, 'registers': 4,
  'distillation_token': True, 'norm': 'rmsnorm', 'qk_norm': True, 'mlp_norm': True,
}  # fmt: skip
BEIT = {'position': 'relative2d', 'qkv_bias': 'qv', 'layer_scale': 0.1}


@pytest.mark.parametrize('blocks', [NEWEST, BEIT], ids=['newest', 'BEiT'])
def test_newer_blocks_on_eight_devices_equal_one(blocks):
  fields = {'variant': 'mu/4x2', 'depth': 2, 'dropout': 0.1, **blocks}
  one, one_metrics = train_one_step(fields, fsdp=1, devices=jax.devices()[:1])
  many, metrics = train_one_step(fields, fsdp=4, devices=jax.devices())
  assert_same_arrays(many, one)
  assert metrics['loss'] == pytest.approx(one_metrics['loss'], rel=1e-5)


@pytest.mark.parametrize('grad_accum_steps', [1, 2])
def test_all_blocks_together_on_eight_devices_equal_one(grad_accum_steps):
  fields = {'variant': 'mu/4x2', 'depth': 2, 'dropout': 0.1, 'drop_path': 0.1, **ALL}
  one, one_metrics = train_one_step(fields, fsdp=1, devices=jax.devices()[:1])
  many, metrics = train_one_step(
    fields, fsdp=4, devices=jax.devices(), grad_accum_steps=grad_accum_steps
  )
  if grad_accum_steps == 1:  # Microbatches have other dropout masks.
    assert_same_arrays(many, one)
    assert metrics['loss'] == pytest.approx(one_metrics['loss'], rel=1e-5)
  assert np.isfinite(metrics['loss'])


@pytest.mark.parametrize(
  'changes', [{'remat': 'vit'}, {'remat': 'dots', 'unroll': 2}, {'remat': 'full', 'unroll': 0}],
  ids=str,
)  # fmt: skip
def test_remat_and_unroll_change_no_gradient_of_all_blocks(changes):
  expected, expected_grads = gradients(ModelConfig(**SMALL, **ALL))
  value, grads = gradients(ModelConfig(**SMALL, **ALL, **changes))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_same_arrays(grads, expected_grads)


@pytest.mark.parametrize('blocks', [ALL, NEWEST], ids=['all', 'newest'])
def test_the_pallas_kernel_gets_rotated_and_normalized_queries_and_keys(blocks):
  logits = {}
  for attention in ('xla', 'pallas'):
    model = build_vit(ModelConfig(**SMALL, **blocks, attention=attention), CLASSES)
    logits[attention] = jit(model.apply)({'params': random_params(model)}, images())
  np.testing.assert_allclose(logits['pallas'], logits['xla'], rtol=1e-4, atol=1e-4)


def test_bfloat16_with_all_blocks_is_close_to_float32():
  logits = {}
  for dtype in ('float32', 'bfloat16'):
    model = build_vit(ModelConfig(**SMALL, **ALL, dtype=dtype), CLASSES)
    params = jax.tree.map(lambda x: x / 2, random_params(model))
    logits[dtype] = np.asarray(jit(model.apply)({'params': params}, images()))
  scale = np.abs(logits['float32']).max()
  assert np.abs(logits['bfloat16'] - logits['float32']).max() <= 0.05 * scale


def test_rotated_scores_depend_on_the_offset_of_two_patches_alone():
  rope, rng = RotaryPositions((3, 5), 1, 100.0), np.random.default_rng(0)
  query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
  qkv = jnp.broadcast_to(jnp.concatenate([query, key, key], axis=-1)[:, 0], (1, 18, 48))
  q, k, v = jnp.split(rope(qkv, 1), 3, axis=-1)
  np.testing.assert_array_equal(v, qkv[..., 32:])
  scores = np.einsum('bnc,bmc->nm', q, k)
  plain = float(jnp.sum(query * key))
  np.testing.assert_allclose(scores[[0, 0, 16, 17], [0, 17, 16, 0]], plain, rtol=1e-5)
  patches = scores[1:16, 1:16].reshape(3, 5, 3, 5)
  np.testing.assert_allclose(patches[:-1, :-1, :-1, :-1], patches[1:, 1:, 1:, 1:], atol=1e-5)
  assert np.ptp(patches) > 1


def test_layer_decay_counts_the_norm_after_pooling_to_the_head_and_the_one_before_to_the_stem():
  model = build_vit(ModelConfig(**SMALL, **ALL), CLASSES)
  params, lr = random_params(model), optax.constant_schedule(1.0)
  ones = jax.tree.map(np.ones_like, params)
  tx = make_optimizer(OptimConfig(name='sgd', b1=0.0, lr=1.0, layer_decay=0.5), lr, params)
  updates, _ = optax.with_extra_args_support(tx).update(
    ones, tx.init(params), params, step=0, loss=0.0, grad_norm=0.0
  )
  updates = flatten_dict(updates, sep='/')
  assert np.abs(updates['fc_norm/scale']).max() == 1
  assert np.abs(updates['Transformer/pre_norm/scale']).max() == 0.5**4
  scales = np.abs(updates['Transformer/encoderblock/mlp_scale'])
  np.testing.assert_allclose(scales, np.full((3, 16), [[0.125], [0.25], [0.5]]))


WRONG = {
  'position': {'position': 'rope', 'width': 18, 'heads': 3},
  'position_at': {'position': 'rope', 'position_at': 'every'},
  'rope_register_theta': {'position': 'rope', 'registers': 3, 'rope_register_theta': 10.0},
  'registers': {'position': 'relative2d', 'registers': 2},
  'distillation_token': {'position': 'relative2d', 'distillation_token': True},
  'attention': {'position': 'relative2d', 'attention': 'pallas'},
}


@pytest.mark.parametrize('setting', WRONG)
def test_positions_that_do_not_fit_are_errors(setting):
  with pytest.raises(UserError, match=f'config.model.{setting}='):
    build_vit(ModelConfig(**SMALL | WRONG[setting]), CLASSES)


def test_an_axial_vit_refuses_rotary_positions_and_a_class_token():
  config = ModelConfig(**SMALL | {'variant': 'AxialViT-mu/4x2', 'pool': 'gap'})
  refused = {'position': 'rope', 'class_token': True, 'rope_theta': 10.0}
  for name, value in (*refused.items(), ('position', 'relative2d'), ('position', 'learned+rope')):
    with pytest.raises(UserError, match=f'config.model.{name}='):
      build_model(dataclasses.replace(config, **{name: value}), CLASSES)


def test_a_gated_mlp_counts_three_products_instead_of_two():
  flops = [
    build_vit(ModelConfig(variant='B/16', swiglu=swiglu), 0).shape.flops((224, 224))
    for swiglu in (False, True)
  ]
  assert flops[1] - flops[0] == 2 * 12 * 197 * 768 * 3072
