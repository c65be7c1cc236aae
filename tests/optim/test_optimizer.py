"""Tests of schedules against formulas, and of optimizers against optax and recurrences in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
from vit_jax.step import abstract_params

RNG = np.random.default_rng(0)
PARAMS = {
  'head': {
    'kernel': RNG.normal(size=(4, 3)).astype(np.float32),
    'bias': RNG.normal(size=3).astype(np.float32),
  },
  'cls': RNG.normal(size=(1, 4)).astype(np.float32),
}


def run(tx: optax.GradientTransformation, params: dict, *, steps: int = 6, scale: float = 1.0):
  """Return the parameters after each step and the last state.

  The gradients are random, and the same for every `tx`.
  """
  rng, history = np.random.default_rng(1), []
  update, state = jax.jit(optax.with_extra_args_support(tx).update), tx.init(params)
  for step in range(steps):
    grads = jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), params)
    updates, state = update(grads, state, params, step=step, grad_norm=optax.tree.norm(grads))
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history, state


def assert_trees_close(a, b, *, atol: float = 1e-6):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


# From 0.8 to 0.1 in 100 steps with 10 of warm-up, as functions of progress = (step - 10) / 90.
FORMULAS = {
  'constant': lambda progress: 0.8 + 0 * progress,
  'linear': lambda progress: 0.8 + (0.1 - 0.8) * progress,
  'cosine': lambda progress: 0.1 + (0.8 - 0.1) * (1 + np.cos(np.pi * progress)) / 2,
  'rsqrt': lambda progress: 0.8 / np.sqrt(1 + 90 * progress / 40),
}


def rates(**fields) -> np.ndarray:
  config = OptimConfig(lr=0.8, lr_end=0.1, rsqrt_timescale=40, **fields)
  lr = make_lr_schedule(config, steps=100, epoch=20.0)
  return np.array([float(lr(step)) for step in range(101)])


@pytest.mark.parametrize('name', FORMULAS)
@pytest.mark.parametrize('warmup', ['10', '0.5ep', '10%'])
def test_the_warm_up_multiplies_the_decayed_learning_rate(name, warmup):
  step = np.arange(101)
  expected = FORMULAS[name](np.maximum(step - 10, 0) / 90) * np.minimum(1, step / 10)
  np.testing.assert_allclose(rates(schedule=name, warmup=warmup), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', FORMULAS)
def test_the_cool_down_ends_at_lr_end(name):
  step = np.arange(101)
  plain = FORMULAS[name](np.maximum(step - 10, 0) / 90) * np.minimum(1, step / 10)
  remaining = np.minimum(1, (100 - step) / 25)
  actual = rates(schedule=name, warmup='10', cooldown='25')
  np.testing.assert_allclose(actual, 0.1 + (plain - 0.1) * remaining, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(actual[:76], plain[:76], rtol=1e-5)
  assert actual[100] == pytest.approx(0.1)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_decays_start_at_lr_without_a_warm_up_and_end_at_lr_end(name):
  actual = rates(schedule=name)
  assert (actual[0], actual[100]) == pytest.approx((0.8, 0.1), rel=1e-6)
  assert np.all(np.diff(actual) < 0)


def test_a_schedule_is_the_same_inside_jit():
  config = OptimConfig(lr=0.8, lr_end=0.1, warmup='10', cooldown='20')
  lr = make_lr_schedule(config, steps=100, epoch=20.0)
  inside = jax.jit(jax.vmap(lr))(jnp.arange(101))
  np.testing.assert_allclose(inside, [float(lr(step)) for step in range(101)], rtol=1e-6, atol=1e-8)


def test_adamw_equals_optaxs_and_decays_only_matching_parameters():
  config = OptimConfig(
    name='adamw', b1=0.8, b2=0.95, weight_decay=0.3, weight_decay_mask='.*/kernel'
  )
  lr = optax.linear_schedule(0.1, 0.01, 6)
  mask = {'head': {'kernel': True, 'bias': False}, 'cls': False}
  masked, _ = run(make_optimizer(config, lr, PARAMS), PARAMS)
  expected, _ = run(optax.adamw(lr, b1=0.8, b2=0.95, weight_decay=0.3, mask=mask), PARAMS)
  assert_trees_close(masked, expected)
  config = OptimConfig(b1=0.8, b2=0.95, weight_decay=0.3)
  full, _ = run(make_optimizer(config, lr, PARAMS), PARAMS)
  assert np.abs(full[-1]['head']['kernel'] - masked[-1]['head']['kernel']).max() == 0
  assert np.abs(full[-1]['head']['bias'] - masked[-1]['head']['bias']).max() > 1e-3


@pytest.mark.parametrize(
  ('mask', 'factors'), [('.*/kernel', (100, 0, 0)), ('.*', (100, 1, 1)), ('cls', (0, 0, 1))]
)
def test_the_head_factor_multiplies_the_decay_of_a_head_kernel_that_decays(mask, factors):
  config = OptimConfig(
    name='sgd', b1=0.0, weight_decay=0.01, head_weight_decay_factor=100.0, weight_decay_mask=mask
  )
  tx = make_optimizer(config, optax.constant_schedule(1.0), PARAMS)
  updates, _ = tx.update(jax.tree.map(np.zeros_like, PARAMS), tx.init(PARAMS), PARAMS, step=0)
  kernel, bias, cls = (np.float32(-0.01 * factor) for factor in factors)
  expected = {
    'head': {'kernel': kernel * PARAMS['head']['kernel'], 'bias': bias * PARAMS['head']['bias']}
  }
  assert_trees_close(updates, expected | {'cls': cls * PARAMS['cls']})


def test_sgd_equals_optaxs_after_clipping_the_global_norm():
  config = OptimConfig(name='sgd', b1=0.9, grad_clip_norm=1.0)
  actual, _ = run(make_optimizer(config, optax.constant_schedule(0.1), PARAMS), PARAMS, scale=3)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
  expected, _ = run(tx, PARAMS, scale=3)
  assert_trees_close(actual, expected)


@pytest.mark.parametrize(('scale', 'clipped'), [(10.0, True), (0.01, False)])
def test_clipping_scales_large_gradients_to_the_norm_and_leaves_small_ones(scale, clipped):
  config = OptimConfig(name='sgd', b1=0.0, grad_clip_norm=1.0)
  tx = make_optimizer(config, optax.constant_schedule(1.0), PARAMS)
  grads = jax.tree.map(lambda p: scale * p, PARAMS)
  norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(grads)))
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, step=0, grad_norm=norm)
  factor = 1 / norm if clipped else 1
  assert_trees_close(updates, jax.tree.map(lambda g: -factor * g, grads))


def adafactor(grads: list[np.ndarray], *, b1: float, b2: float, factored: bool) -> list[np.ndarray]:
  """Return the updates of Adafactor for one matrix, as in "Scaling ViT" and in float64."""
  shape = grads[0].shape
  row, column = np.zeros(shape[0]), np.zeros(shape[1])
  full, momentum, out = np.zeros(shape), np.zeros(shape), []
  for t, grad in enumerate(np.asarray(grads, np.float64), start=1):
    decay = min(b2, 1 - t**-0.8)
    row = decay * row + (1 - decay) * (grad**2).mean(axis=1)
    column = decay * column + (1 - decay) * (grad**2).mean(axis=0)
    full = decay * full + (1 - decay) * grad**2
    second = np.outer(row, column) / row.mean() if factored else full
    momentum = b1 * momentum + (1 - b1) * grad / np.sqrt(second)
    out.append(momentum)
  return out


@pytest.mark.parametrize(
  ('shape', 'factored'), [((32, 40), True), ((48, 32), True), ((31, 64), False), ((5, 3), False)]
)
@pytest.mark.parametrize('b2', [0.999, 0.5])
def test_adafactor_follows_the_recurrence_of_scaling_vision_transformers(shape, factored, b2):
  config = OptimConfig(name='adafactor', b1=0.9, b2=b2)
  params = {'head': {'kernel': np.zeros(shape, np.float32)}}
  history, _ = run(make_optimizer(config, optax.constant_schedule(1.0), params), params, steps=8)
  rng = np.random.default_rng(1)
  grads = [rng.normal(size=shape).astype(np.float32) for _ in range(8)]
  expected = -np.cumsum(adafactor(grads, b1=0.9, b2=b2, factored=factored), axis=0)
  actual = [params['head']['kernel'] for params in history]
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
  ('name', 'shape'),
  [('scale', (40,)), ('bias', (2, 36)), ('kernel', (34, 40)), ('query', (34, 2, 32))],
)
def test_adafactor_treats_stacked_blocks_as_separate_parameters(name, shape):
  # The depth of 33 blocks is as long as a side that would be factored.
  nested = lambda array: {'Transformer': {'encoderblock': {name: array}}}
  params = np.zeros((33, *shape), np.float32)
  lr = optax.constant_schedule(1.0)
  make = lambda params: make_optimizer(OptimConfig(name='adafactor'), lr, params)
  stacked, _ = run(make(nested(params)), nested(params), steps=3)
  grads = np.random.default_rng(1)
  tx = make({'head': params[0]})
  states, blocks = [tx.init({'head': params[0]})] * 33, [params[0]] * 33
  update = jax.jit(tx.update)
  for _ in range(3):
    grad = grads.normal(size=params.shape).astype(np.float32)
    for i in range(33):
      updates, states[i] = update({'head': grad[i]}, states[i], {'head': blocks[i]}, step=0)
      blocks[i] = blocks[i] + updates['head']
  actual = stacked[-1]['Transformer']['encoderblock'][name]
  np.testing.assert_allclose(actual, blocks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor', 'lamb'])
def test_momentum_dtype_applies_to_the_first_moment_only(name):
  params = {'head': {'kernel': np.zeros((32, 64), np.float32)}}
  ends = {}
  for dtype in ('float32', 'bfloat16'):
    config = OptimConfig(name=name, momentum_dtype=dtype)
    tx = make_optimizer(config, optax.constant_schedule(0.1), params)
    history, state = run(tx, params, steps=3)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    half = [leaf.shape for leaf in arrays if leaf.dtype == jnp.bfloat16]
    assert half == ([(32, 64)] if dtype == 'bfloat16' else [])
    # Adam's second moment has this shape too; Adafactor's is a row and a column.
    count = [leaf.shape for leaf in arrays].count((32, 64))
    assert count == {'adamw': 2, 'sgd': 1, 'adafactor': 1, 'lamb': 2}[name]
    ends[dtype] = np.asarray(history[-1]['head']['kernel'])
    assert ends[dtype].dtype == np.float32
  # The moment is rounded to 8 bits between steps.
  assert 0 < np.abs(ends['bfloat16'] - ends['float32']).max() < 0.01 * np.abs(ends['float32']).max()


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor', 'lamb', 'lion'])
def test_frozen_parameters_do_not_change_and_have_no_optimizer_state(name):
  lr = optax.constant_schedule(0.1)
  fields = {
    'name': name, 'grad_clip_norm': 1.0, 'weight_decay': 0.1, 'weight_decay_mask': '.*/kernel',
  }  # fmt: skip
  config = OptimConfig(**fields, freeze='cls|.*/bias')
  history, state = run(make_optimizer(config, lr, PARAMS), PARAMS)
  np.testing.assert_array_equal(history[-1]['cls'], PARAMS['cls'])
  np.testing.assert_array_equal(history[-1]['head']['bias'], PARAMS['head']['bias'])
  alone = {'head': {'kernel': PARAMS['head']['kernel']}}
  assert np.abs(history[-1]['head']['kernel'] - alone['head']['kernel']).max() > 1e-3
  # The state is that of an optimizer for the trained parameter alone.
  expected = make_optimizer(OptimConfig(**fields), lr, alone).init(alone)
  shapes = lambda state: sorted(leaf.shape for leaf in jax.tree.leaves(state))
  assert shapes(state) == shapes(expected)


@pytest.fixture(scope='module')
def ones():
  """Return ones in the shapes of a model with 3 blocks, a hidden head and all kinds of tokens."""
  fields = {
    'width': 8, 'mlp': 8, 'depth': 3, 'registers': 1, 'hidden_head': True, 'patch_norm': True,
  }  # fmt: skip

  def tree(pool: str) -> dict:
    model = build_vit(ModelConfig(variant='mu/4', pool=pool, **fields), 5)
    return abstract_params(model, (8, 8))

  return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree('map') | tree('token'))


def expected_factor(path: str) -> np.ndarray:
  """Return the factor for a decay of 1/2: head 1, blocks 1/8, 1/4 and 1/2, the rest 1/16."""
  if path.startswith('Transformer/encoderblock/'):
    return np.array([1 / 8, 1 / 4, 1 / 2])
  heads = ('head/', 'pre_logits/', 'MAPHead_0/', 'Transformer/encoder_norm/')
  before = ('embedding/', 'cls', 'registers', 'Transformer/posembed_input/')
  assert path.startswith((*heads, *before)), path
  return np.array([1.0]) if path.startswith(heads) else np.array([1 / 16])


@pytest.mark.parametrize(
  'freeze', ['', 'embedding/.*', 'Transformer/encoderblock/MlpBlock_3/.*', 'Transformer/.*']
)
def test_layer_decay_applies_once_per_block_away_from_the_head(ones, freeze):
  config = OptimConfig(name='sgd', b1=0.0, layer_decay=0.5, freeze=freeze)
  tx = make_optimizer(config, optax.constant_schedule(1.0), ones)
  updates, _ = tx.update(ones, tx.init(ones), ones, step=0)
  for keys, update in jax.tree.leaves_with_path(updates):
    path = '/'.join(key.key for key in keys)
    frozen = freeze and path.startswith(freeze.removesuffix('.*'))
    factor = expected_factor(path) * (not frozen)
    expected = np.broadcast_to(factor.reshape(-1, *[1] * (update.ndim - 1)), update.shape)
    np.testing.assert_allclose(update, -expected, rtol=1e-6, err_msg=path)


def test_layer_decay_scales_the_weight_decay_too(ones):
  config = OptimConfig(name='sgd', b1=0.0, layer_decay=0.5, weight_decay=0.1)
  tx = make_optimizer(config, optax.constant_schedule(1.0), ones)
  zeros = jax.tree.map(np.zeros_like, ones)
  updates, _ = tx.update(zeros, tx.init(ones), ones, step=0)
  np.testing.assert_allclose(updates['cls'], np.full((1, 1, 8), -0.1 / 16), rtol=1e-6)
  np.testing.assert_allclose(updates['head']['bias'], np.full(5, -0.1), rtol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'freeze': 'heads/.*'}, r"freeze='heads/\.\*'.*'cls'"),
    ({'freeze': 'head'}, "freeze='head'"),  # Only a part of a path.
    ({'weight_decay_mask': 'kernel', 'weight_decay': 0.1}, "weight_decay_mask='kernel'"),
    ({'freeze': '.*'}, r"freeze='\.\*'.*every parameter"),
    ({'norm_momentum': 0.5}, 'norm_momentum=0.5'),
    ({'layer_decay': 0.9}, 'layer_decay=0.9'),
  ],
  ids=str,
)
def test_settings_without_effect_on_the_parameters_are_errors(fields, named):
  with pytest.raises(UserError, match=f'config.optim.{named}'):
    make_optimizer(OptimConfig(**fields), optax.constant_schedule(0.1), PARAMS)


def test_an_optimizer_can_be_made_from_shapes():
  shapes = jax.eval_shape(lambda: PARAMS)
  config = OptimConfig(weight_decay=0.1, freeze='cls', head_weight_decay_factor=0.5)
  tx = make_optimizer(config, optax.constant_schedule(0.1), shapes)
  assert jax.tree.leaves(jax.eval_shape(tx.init, shapes))


def test_a_staircase_falls_at_its_boundaries_after_the_warm_up():
  """BiT's rule for 500 steps: 100 of warm-up, then a tenth of the rate from 30, 60 and 90 % on."""
  config = OptimConfig(lr=0.003, schedule='staircase', warmup='100', lr_boundaries='30%,60%,90%')
  lr = make_lr_schedule(config, steps=500, epoch=10.0)
  expected = {
    0: 0, 50: 0.0015, 100: 0.003, 149: 0.003, 150: 3e-4, 299: 3e-4, 300: 3e-5, 449: 3e-5, 450: 3e-6,
    499: 3e-6,
  }  # fmt: skip
  for step, rate in expected.items():
    assert float(lr(step)) == pytest.approx(rate, rel=1e-5)


def test_a_staircase_can_fall_at_regular_intervals():
  """Noisy Student multiplies by 0.97 every 2.4 epochs, here of 10 steps."""
  config = OptimConfig(
    lr=0.128, schedule='staircase', lr_boundary_every='2.4ep', lr_boundary_factor=0.97
  )
  lr = make_lr_schedule(config, steps=100, epoch=10.0)
  for step in (0, 23, 24, 71, 72, 99):
    assert float(lr(step)) == pytest.approx(0.128 * 0.97 ** (step // 24), rel=1e-5)


def test_rmsprop_equals_tensorflows_with_coupled_weight_decay():
  """The mean square starts at 1, epsilon is under the root, and the decay is added to gradients."""
  lr, decay, momentum, wd = 0.05, 0.9, 0.8, 0.1
  config = OptimConfig(
    name='rmsprop', b1=momentum, b2=decay, weight_decay=wd, coupled_weight_decay=True,
    weight_decay_mask='.*/kernel',
  )  # fmt: skip
  history, _ = run(make_optimizer(config, optax.constant_schedule(lr), PARAMS), PARAMS)
  rng = np.random.default_rng(1)
  params = jax.tree.map(np.float64, PARAMS)
  square, moment = jax.tree.map(np.ones_like, params), jax.tree.map(np.zeros_like, params)
  for after in history:
    draw = lambda p: rng.normal(size=p.shape).astype(np.float32).astype(np.float64)
    grads = jax.tree.map(draw, PARAMS)
    grads['head']['kernel'] += wd * params['head']['kernel']
    square = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g * g, square, grads)
    step = lambda m, g, s: momentum * m + g / np.sqrt(s + 1e-3)
    moment = jax.tree.map(step, moment, grads, square)
    params = jax.tree.map(lambda p, m: p - lr * m, params, moment)
    assert_trees_close(after, params, atol=1e-5)
