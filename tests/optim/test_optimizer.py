"""Schedules against their formulas, optimizers against optax's own and against recurrences in NumPy."""

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
  """(parameters after each step, the last state), by gradients that are random and the same for every `tx`."""
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


# 100 steps with 10 of warm-up, from 0.8 to 0.1: what progress = (step - 10) / 90 makes of it.
FORMULAS = {
  'constant': lambda progress: 0.8 + 0 * progress,
  'linear': lambda progress: 0.8 + (0.1 - 0.8) * progress,
  'cosine': lambda progress: 0.1 + (0.8 - 0.1) * (1 + np.cos(np.pi * progress)) / 2,
  'rsqrt': lambda progress: 0.8 / np.sqrt(1 + 90 * progress / 40),
}


def rates(**fields) -> np.ndarray:
  config = OptimConfig(lr=0.8, lr_end=0.1, rsqrt_timescale=40, **fields)
  return np.array(
    [float(make_lr_schedule(config, steps=100, epoch=20.0)(step)) for step in range(101)]
  )


@pytest.mark.parametrize('name', FORMULAS)
@pytest.mark.parametrize('warmup', ['10', '0.5ep', '10%'])
def test_the_warm_up_multiplies_the_decayed_rate(name, warmup):
  step = np.arange(101)
  expected = FORMULAS[name](np.maximum(step - 10, 0) / 90) * np.minimum(1, step / 10)
  np.testing.assert_allclose(rates(schedule=name, warmup=warmup), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', FORMULAS)
def test_the_cool_down_ends_at_lr_end(name):
  step = np.arange(101)
  plain = FORMULAS[name](np.maximum(step - 10, 0) / 90) * np.minimum(1, step / 10)
  left = np.minimum(1, (100 - step) / 25)
  got = rates(schedule=name, warmup='10', cooldown='25')
  np.testing.assert_allclose(got, 0.1 + (plain - 0.1) * left, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(got[:76], plain[:76], rtol=1e-5)
  assert got[100] == pytest.approx(0.1)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_decays_start_at_lr_without_a_warm_up_and_end_at_lr_end(name):
  got = rates(schedule=name)
  assert (got[0], got[100]) == pytest.approx((0.8, 0.1), rel=1e-6)
  assert np.all(np.diff(got) < 0)


def test_a_schedule_is_the_same_inside_jit():
  config = OptimConfig(lr=0.8, lr_end=0.1, warmup='10', cooldown='20')
  lr = make_lr_schedule(config, steps=100, epoch=20.0)
  inside = jax.jit(jax.vmap(lr))(jnp.arange(101))
  np.testing.assert_allclose(inside, [float(lr(step)) for step in range(101)], rtol=1e-6, atol=1e-8)


def test_adamw_is_that_of_optax_and_decays_only_what_matches():
  config = OptimConfig(
    name='adamw', b1=0.8, b2=0.95, weight_decay=0.3, weight_decay_mask='.*/kernel'
  )
  lr = optax.linear_schedule(0.1, 0.01, 6)
  mask = {'head': {'kernel': True, 'bias': False}, 'cls': False}
  theirs = optax.adamw(lr, b1=0.8, b2=0.95, weight_decay=0.3, mask=mask)
  got, _ = run(make_optimizer(config, lr, PARAMS), PARAMS)
  expected, _ = run(theirs, PARAMS)
  assert_trees_close(got, expected)
  everything, _ = run(
    make_optimizer(OptimConfig(b1=0.8, b2=0.95, weight_decay=0.3), lr, PARAMS), PARAMS
  )
  assert np.abs(everything[-1]['head']['kernel'] - got[-1]['head']['kernel']).max() == 0
  assert np.abs(everything[-1]['head']['bias'] - got[-1]['head']['bias']).max() > 1e-3


@pytest.mark.parametrize(
  ('decay', 'factors'), [('.*/kernel', (100, 0, 0)), ('.*', (100, 1, 1)), ('cls', (0, 0, 1))]
)
def test_the_heads_kernel_decays_so_many_times_as_fast_where_it_decays(decay, factors):
  config = OptimConfig(
    name='sgd', b1=0.0, weight_decay=0.01, head_weight_decay_factor=100.0, weight_decay_mask=decay
  )
  tx = make_optimizer(config, optax.constant_schedule(1.0), PARAMS)
  updates, _ = tx.update(jax.tree.map(np.zeros_like, PARAMS), tx.init(PARAMS), PARAMS, step=0)
  kernel, bias, cls = (np.float32(-0.01 * factor) for factor in factors)
  expected = {
    'head': {'kernel': kernel * PARAMS['head']['kernel'], 'bias': bias * PARAMS['head']['bias']}
  }
  assert_trees_close(updates, expected | {'cls': cls * PARAMS['cls']})


def test_sgd_is_that_of_optax_after_clipping_the_global_norm():
  config = OptimConfig(name='sgd', b1=0.9, grad_clip_norm=1.0)
  got, _ = run(make_optimizer(config, optax.constant_schedule(0.1), PARAMS), PARAMS, scale=3)
  expected, _ = run(
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), PARAMS, scale=3
  )
  assert_trees_close(got, expected)


@pytest.mark.parametrize(('scale', 'length'), [(10.0, 1.0), (0.01, None)])
def test_clipping_shortens_long_gradients_to_the_norm_and_leaves_short_ones(scale, length):
  tx = make_optimizer(
    OptimConfig(name='sgd', b1=0.0, grad_clip_norm=1.0), optax.constant_schedule(1.0), PARAMS
  )
  grads = jax.tree.map(lambda p: scale * p, PARAMS)
  norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(grads)))
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, step=0, grad_norm=norm)
  factor = length / norm if length else 1
  assert_trees_close(updates, jax.tree.map(lambda g: -factor * g, grads))


def adafactor(grads: list[np.ndarray], *, b1: float, b2: float, factored: bool) -> list[np.ndarray]:
  """The updates of Adafactor as in Scaling ViT, for one matrix, in float64: paper.md §8.3."""
  shape = grads[0].shape
  row, column, full, momentum = (
    np.zeros(shape[0]),
    np.zeros(shape[1]),
    np.zeros(shape),
    np.zeros(shape),
  )
  out = []
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
  np.testing.assert_allclose(
    [params['head']['kernel'] for params in history], expected, rtol=2e-4, atol=2e-5
  )


@pytest.mark.parametrize(
  ('name', 'shape'), [('scale', (40,)), ('bias', (2, 36)), ('kernel', (34, 40))]
)
def test_adafactor_treats_each_block_as_if_it_were_not_stacked(name, shape):
  # 33 blocks: the depth is as long as the side of a matrix that is factored.
  nested = lambda array: {'Transformer': {'encoderblock': {name: array}}}
  params = np.zeros((33, *shape), np.float32)
  lr = optax.constant_schedule(1.0)
  make = lambda params: make_optimizer(OptimConfig(name='adafactor'), lr, params)
  stacked, _ = run(make(nested(params)), nested(params), steps=3)
  grads = np.random.default_rng(1)
  tx = make({'head': params[0]})
  states, own = [tx.init({'head': params[0]})] * 33, [params[0]] * 33
  update = jax.jit(tx.update)
  for _ in range(3):
    grad = grads.normal(size=params.shape).astype(np.float32)
    for i in range(33):
      updates, states[i] = update({'head': grad[i]}, states[i], {'head': own[i]}, step=0)
      own[i] = own[i] + updates['head']
  np.testing.assert_allclose(
    stacked[-1]['Transformer']['encoderblock'][name], own, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor'])
def test_only_the_first_moment_is_bfloat16_where_that_is_asked_for(name):
  params = {'head': {'kernel': np.zeros((32, 64), np.float32)}}
  ends = {}
  for dtype in ('float32', 'bfloat16'):
    tx = make_optimizer(
      OptimConfig(name=name, momentum_dtype=dtype), optax.constant_schedule(0.1), params
    )
    history, state = run(tx, params, steps=3)
    arrays = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert [shape for shape, kind in arrays if kind == 'bfloat16'] == (
      [(32, 64)] if dtype == 'bfloat16' else []
    )
    # Adam's second moment is the other array of that shape; Adafactor's is factored into a row and a column.
    assert [shape for shape, _ in arrays].count((32, 64)) == {'adamw': 2, 'sgd': 1, 'adafactor': 1}[
      name
    ]
    ends[dtype] = np.asarray(history[-1]['head']['kernel'])
    assert ends[dtype].dtype == np.float32
  # The moment is rounded to 8 bits between steps, not dropped.
  assert 0 < np.abs(ends['bfloat16'] - ends['float32']).max() < 0.01 * np.abs(ends['float32']).max()


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor'])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_state(name):
  lr = optax.constant_schedule(0.1)
  fields = {
    'name': name,
    'grad_clip_norm': 1.0,
    'weight_decay': 0.1,
    'weight_decay_mask': '.*/kernel',
  }
  history, state = run(
    make_optimizer(OptimConfig(**fields, freeze='cls|.*/bias'), lr, PARAMS), PARAMS
  )
  np.testing.assert_array_equal(history[-1]['cls'], PARAMS['cls'])
  np.testing.assert_array_equal(history[-1]['head']['bias'], PARAMS['head']['bias'])
  alone = {'head': {'kernel': PARAMS['head']['kernel']}}
  assert np.abs(history[-1]['head']['kernel'] - alone['head']['kernel']).max() > 1e-3
  # The state is that of the one trained parameter by itself.
  expected = make_optimizer(OptimConfig(**fields), lr, alone).init(alone)
  shapes = lambda state: sorted(leaf.shape for leaf in jax.tree.leaves(state))
  assert shapes(state) == shapes(expected)


@pytest.fixture(scope='module')
def ones():
  """A tree of ones in the shapes of a model with 3 blocks, a hidden head and every kind of token."""
  fields = {
    'width': 8,
    'mlp': 8,
    'depth': 3,
    'registers': 1,
    'hidden_head': True,
    'patch_norm': True,
  }
  tree = lambda pool: abstract_params(
    build_vit(ModelConfig(variant='mu/4', pool=pool, **fields), 5), (8, 8)
  )
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree('map') | tree('token'))


def expected_factor(path: str) -> np.ndarray:
  """For a decay of 1/2 and 3 blocks: the head at 1, the last block at 1/2, the first at 1/8, all before at 1/16."""
  if path.startswith('Transformer/encoderblock/'):
    return np.array([1 / 8, 1 / 4, 1 / 2])
  heads = ('head/', 'pre_logits/', 'MAPHead_0/', 'Transformer/encoder_norm/')
  before = ('embedding/', 'cls', 'registers', 'Transformer/posembed_input/')
  assert path.startswith((*heads, *before)), path
  return np.array([1.0]) if path.startswith(heads) else np.array([1 / 16])


@pytest.mark.parametrize(
  'frozen', ['', 'embedding/.*', 'Transformer/encoderblock/MlpBlock_3/.*', 'Transformer/.*']
)
def test_layer_decay_falls_with_each_block_away_from_the_head(ones, frozen):
  config = OptimConfig(name='sgd', b1=0.0, layer_decay=0.5, freeze=frozen)
  tx = make_optimizer(config, optax.constant_schedule(1.0), ones)
  updates, _ = tx.update(ones, tx.init(ones), ones, step=0)
  for keys, update in jax.tree.leaves_with_path(updates):
    path = '/'.join(key.key for key in keys)
    factor = expected_factor(path) * (not (frozen and path.startswith(frozen.removesuffix('.*'))))
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
  ('fields', 'message'),
  [
    (
      {'freeze': 'heads/.*'},
      "config.optim.freeze='heads/.*' matches no parameter; a whole path looks like 'cls'",
    ),
    (
      {'freeze': 'head'},
      "config.optim.freeze='head' matches no parameter",
    ),  # Only a part of a path.
    (
      {'weight_decay_mask': 'kernel', 'weight_decay': 0.1},
      "config.optim.weight_decay_mask='kernel' matches no parameter",
    ),
    (
      {'freeze': '.*'},
      "config.optim.freeze='.*' matches every parameter: nothing is left to train",
    ),
  ],
)
def test_patterns_that_match_nothing_or_everything_are_errors(fields, message):
  with pytest.raises(UserError) as error:
    make_optimizer(OptimConfig(**fields), optax.constant_schedule(0.1), PARAMS)
  assert message in str(error.value)


def test_shapes_are_enough_to_make_an_optimizer():
  shapes = jax.eval_shape(lambda: PARAMS)
  config = OptimConfig(weight_decay=0.1, freeze='cls', head_weight_decay_factor=0.5)
  assert jax.tree.leaves(
    jax.eval_shape(make_optimizer(config, optax.constant_schedule(0.1), shapes).init, shapes)
  )


def test_layer_decay_without_stacked_blocks_is_an_error():
  with pytest.raises(
    UserError, match=r'config\.optim\.layer_decay=0\.9: only Transformers have blocks'
  ):
    make_optimizer(OptimConfig(layer_decay=0.9), optax.constant_schedule(0.1), PARAMS)


def test_a_staircase_falls_at_its_durations_after_the_warm_up():
  """BiT's rule: 100 steps of warm-up, a tenth of the rate from 30, 60 and 90 % of 500 steps on."""
  config = OptimConfig(lr=0.003, schedule='staircase', warmup='100', lr_boundaries='30%,60%,90%')
  lr = make_lr_schedule(config, steps=500, epoch=10.0)
  known = {
    0: 0,
    50: 0.0015,
    100: 0.003,
    149: 0.003,
    150: 3e-4,
    299: 3e-4,
    300: 3e-5,
    449: 3e-5,
    450: 3e-6,
    499: 3e-6,
  }
  for step, rate in known.items():
    assert float(lr(step)) == pytest.approx(rate, rel=1e-5)


def test_a_staircase_that_falls_every_so_often_is_noisy_students():
  """0.97 every 2.4 epochs of 10 steps."""
  lr = make_lr_schedule(
    OptimConfig(lr=0.128, schedule='staircase', lr_boundary_every='2.4ep', lr_boundary_factor=0.97),
    steps=100,
    epoch=10.0,
  )
  for step in (0, 23, 24, 71, 72, 99):
    assert float(lr(step)) == pytest.approx(0.128 * 0.97 ** (step // 24), rel=1e-5)


def test_rmsprop_is_tensorflows_with_coupled_decay():
  """Against the recurrence in float64: the mean square starts at 1, epsilon is under the root, L2 goes through the momentum."""
  lr, decay, momentum, wd = 0.05, 0.9, 0.8, 0.1
  config = OptimConfig(
    name='rmsprop',
    b1=momentum,
    b2=decay,
    weight_decay=wd,
    coupled_weight_decay=True,
    weight_decay_mask='.*/kernel',
  )
  history, _ = run(make_optimizer(config, optax.constant_schedule(lr), PARAMS), PARAMS)
  rng = np.random.default_rng(1)
  params = jax.tree.map(np.float64, PARAMS)
  square, moment = jax.tree.map(np.ones_like, params), jax.tree.map(np.zeros_like, params)
  for after in history:
    grads = jax.tree.map(
      lambda p: rng.normal(size=p.shape).astype(np.float32).astype(np.float64), PARAMS
    )
    grads['head']['kernel'] += wd * params['head']['kernel']
    square = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g * g, square, grads)
    moment = jax.tree.map(
      lambda m, g, s: momentum * m + g / np.sqrt(s + 1e-3), moment, grads, square
    )
    params = jax.tree.map(lambda p, m: p - lr * m, params, moment)
    assert_trees_close(after, params, atol=1e-5)
