"""Tests of the Vision Transformer against a second implementation in NumPy and float64.

It follows the equations of arXiv 2010.11929 and knows nothing of stacked or fused parameters.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.models.test_resnet import equations
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import ViTShape
from vit_jax.models.vit import Transformer, build_vit, drop_path_rates
from vit_jax.step import abstract_params

SIZE = (8, 12)
# Compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# Patches are 4 high and 2 wide: a grid of 2x6.
SMALL = {'variant': 'mu/4x2', 'width': 16, 'depth': 3, 'mlp': 24, 'heads': 4}
CLASSES = 5


def images(count: int = 3) -> np.ndarray:
  return np.random.default_rng(7).integers(0, 256, (count, *SIZE, 3), np.uint8)


def random_params(model, seed: int = 0) -> dict:
  """Draw every array at random, so that each of them changes the logits."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    return (0.4 * rng.normal(size=leaf.shape) + (path[-1].key == 'scale')).astype(np.float32)

  return jax.tree.map_with_path(draw, abstract_params(model, SIZE))


def norm(x, p, eps):
  if 'bias' not in p:  # RMSNorm.
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p['scale']
  centered = x - x.mean(axis=-1, keepdims=True)
  deviation = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps)
  return centered / deviation * p['scale'] + p['bias']


def gelu(x, kind):
  if kind == 'erf':
    return x / 2 * (1 + scipy.special.erf(x / np.sqrt(2)))
  if kind == 'quick':
    return x / (1 + np.exp(-1.702 * x))
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotated(x, c, grid):
  """Rotate the queries or keys [b, n, channels] of one head, patch by patch, as complex numbers."""
  x, half = x.copy(), x.shape[-1] // 2
  falling = lambda base: 1 / base ** (np.arange(half // 2) / (half / 2))
  first = (c.pool == 'token') + c.class_token + c.distillation_token
  turns = []  # Of a token: its index, its row and column in radians, and the frequencies.
  for i, (row, column) in enumerate(np.ndindex(grid), start=first):
    y, x_ = (
      2 * np.pi * ((2 * place + 1) / side - 1) if not c.rope_grid else c.rope_grid * place / side
      for place, side in zip((row, column), grid, strict=True)
    )
    turns.append((i, y, x_, falling(c.rope_theta)))
  if c.rope_register_theta:
    registers = np.ndindex(*[round(c.registers**0.5)] * 2)
    for i, (row, column) in enumerate(registers, start=first + grid[0] * grid[1]):
      turns.append((i, row, column, falling(c.rope_register_theta)))
  for i, y, x_, frequencies in turns:
    turn = np.exp(1j * np.concatenate([y * frequencies, x_ * frequencies]))
    pairs = (x[:, i, :half] + 1j * x[:, i, half:]) * turn
    x[:, i] = np.concatenate([pairs.real, pairs.imag], axis=-1)
  return x


def attention(x, context, p, c, grid=None):
  """Sum the contributions of the heads to the output, computed one head at a time."""
  out = p['out']['bias']
  bias = lambda name, head: p[name]['bias'][head] if 'bias' in p[name] else 0
  for head in range(p['query']['kernel'].shape[1]):
    linear = lambda name, x, head=head: x @ p[name]['kernel'][:, head] + bias(name, head)
    q, k, v = linear('query', x), linear('key', context), linear('value', context)
    if 'query_norm' in p:
      q, k = norm(q, p['query_norm'], c.norm_eps), norm(k, p['key_norm'], c.norm_eps)
    if grid and c.position.endswith('rope'):
      q, k = rotated(q, c, grid), rotated(k, c, grid)
    scores = q @ k.swapaxes(1, 2)
    if c.position == 'relative2d' and grid:
      scores += relative_bias(p['relative']['table'][:, head], c, grid) * np.sqrt(q.shape[-1])
    elif 'relative' in p:  # q_i times (k_j plus the vector of the offset i - j).
      n = scores.shape[1]
      for i, j in np.ndindex(n, n):
        scores[:, i, j] += q[:, i] @ p['relative']['embedding'][n - 1 + i - j]
    scores = np.exp(scores / np.sqrt(q.shape[-1]))
    out = out + scores / scores.sum(axis=-1, keepdims=True) @ v @ p['out']['kernel'][head]
  return out


def relative_bias(table, c, grid):
  """Look up the bias of each query and key: in rows and columns, then those of the class token."""
  places, cls = [*np.ndindex(grid)], int(c.pool == 'token' or c.class_token)
  offsets = [*np.ndindex(2 * grid[0] - 1, 2 * grid[1] - 1)]
  n = len(places) + cls
  bias = np.zeros((n, n))
  for (i, query), (j, key) in itertools.product(enumerate(places, cls), repeat=2):
    offset = (query[0] - key[0] + grid[0] - 1, query[1] - key[1] + grid[1] - 1)
    bias[i, j] = table[offsets.index(offset)]
  if cls:
    bias[0, 1:], bias[1:, 0], bias[0, 0] = table[-3:]
  return bias


def mlp(x, p, kind, eps):
  hidden = x @ p['Dense_0']['kernel'] + p['Dense_0']['bias']
  if 'Gate' in p:
    gate = x @ p['Gate']['kernel'] + p['Gate']['bias']
    hidden = gate / (1 + np.exp(-gate)) * hidden
  else:
    hidden = gelu(hidden, kind)
  hidden = norm(hidden, p['hidden_norm'], eps) if 'hidden_norm' in p else hidden
  return hidden @ p['Dense_1']['kernel'] + p['Dense_1']['bias']


def embed(x, p, c):
  """Cut out each patch, in raster order, and multiply it by the kernel."""
  high, wide = p['kernel'].shape[:2]
  tokens = []
  for row in range(0, x.shape[1], high):
    for column in range(0, x.shape[2], wide):
      patch = x[:, row : row + high, column : column + wide].reshape(len(x), -1)
      patch = norm(patch, p['norm_before'], c.norm_eps) if c.patch_norm else patch
      tokens.append(patch @ p['kernel'].reshape(-1, p['kernel'].shape[-1]) + p.get('bias', 0))
  x = np.stack(tokens, axis=1)
  return norm(x, p['norm_after'], c.norm_eps) if c.patch_norm else x


def sincos(grid, d):
  """Return sin x, cos x, sin y, cos y over the flattened grid, as in arXiv 2205.01580."""
  omega = 1 / 10000 ** (np.arange(d // 4) / (d // 4 - 1))
  rows = [
    (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
    for y, x in np.ndindex(grid)
  ]
  return np.array([np.concatenate(row) for row in rows])


def added(p, c, grid):
  """Return the position embeddings of all tokens, as learned or from columns and rows.

  The class token gets zeros from columns and rows.
  """
  if c.position != 'learned2d':
    return p['pos_embedding']
  rows = [
    np.concatenate([p['column_embedding'][x], p['row_embedding'][y]]) for y, x in np.ndindex(grid)
  ]
  return np.array([np.zeros_like(rows[0])] * (c.pool == 'token' or c.class_token) + rows)


def forward(params, pixels, c, shape):
  """Return the logits in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = embed((pixels.astype(np.float64) - np.array(c.mean)) / np.array(c.scale), p['embedding'], c)
  if c.position == 'sincos2d':
    x = x + sincos(shape.grid(SIZE), shape.width)
  if c.pool == 'token' or c.class_token:
    first = [p['cls'], p['dist']] if c.distillation_token else [p['cls']]
    x = np.concatenate([*(np.repeat(token, len(x), axis=0) for token in first), x], axis=1)
  stem, every = (
    c.position.startswith('learned') and c.position_at == where for where in ('stem', 'every')
  )
  shared = c.position_at == 'shared'
  if stem:
    x = x + added(p['Transformer']['posembed_input'], c, shape.grid(SIZE))
  n = x.shape[1]
  if c.registers:
    x = np.concatenate([x, np.repeat(p['registers'], len(x), axis=0)], axis=1)
  if c.pre_norm:
    x = norm(x, p['Transformer']['pre_norm'], c.norm_eps)
  for i in range(shape.depth):
    block = jax.tree.map(lambda stacked, i=i: stacked[i], p['Transformer']['encoderblock'])
    if every or shared:
      x = x + added((block if every else p['Transformer'])['posembed_input'], c, shape.grid(SIZE))
    y = norm(x, block['LayerNorm_0'], c.norm_eps)
    y = attention(y, y, block['MultiHeadDotProductAttention_1'], c, shape.grid(SIZE))
    x = x + block.get('attention_scale', 1) * y
    y = norm(x, block['LayerNorm_2'], c.norm_eps)
    y = mlp(y, block['MlpBlock_3'], c.gelu, c.norm_eps)
    x = x + block.get('mlp_scale', 1) * y
  x = (x if c.fc_norm else norm(x, p['Transformer']['encoder_norm'], c.norm_eps))[:, :n]
  if c.pool == 'map':
    head = p['MAPHead_0']
    probe = np.repeat(head['probe'], len(x), axis=0)
    y = attention(probe, x, head['MultiHeadDotProductAttention_0'], c)
    y = y + mlp(norm(y, head['LayerNorm_0'], c.norm_eps), head['MlpBlock_0'], c.gelu, c.norm_eps)
    x = y
  if c.distillation_token:
    x = np.concatenate([x[:, 0], x[:, 1]], axis=1)
  else:
    x = x[:, int(c.class_token) :].mean(axis=1) if c.pool == 'gap' else x[:, 0]
  x = norm(x, p['fc_norm'], c.norm_eps) if c.fc_norm else x
  if c.hidden_head:
    x = np.tanh(x @ p['pre_logits']['kernel'] + p['pre_logits']['bias'])
  return x @ p['head']['kernel'] + p['head']['bias']


IMAGENET = {'mean': (123.675, 116.28, 103.53), 'scale': (58.395, 57.12, 57.375)}
MODELS = {
  'the paper': {},
  'the paper in pre-training': {'hidden_head': True},
  'better plain baselines': {'pool': 'gap', 'position': 'sincos2d', 'hidden_head': True},
  'token over fixed positions': {'position': 'sincos2d', 'gelu': 'erf'},
  'attention pooling': {'pool': 'map', 'patch_norm': True, 'gelu': 'erf'},
  'registers': {'registers': 3, 'position': 'none', **IMAGENET},
  'registers and pooling': {'registers': 2, 'pool': 'gap', 'norm_eps': 0.1},
  'positions of rows and columns': {'position': 'learned2d'},
  'positions in every block': {'position_at': 'every', 'pool': 'gap'},
  'rows and columns in every block': {'position': 'learned2d', 'position_at': 'every'},
  'shared positions': {'position_at': 'shared'},
  'shared rows and columns': {'position': 'learned2d', 'position_at': 'shared', 'pool': 'gap'},
  'relative positions': {'position': 'relative'},
  'rotary positions': {'position': 'rope', 'rope_theta': 20.0, 'registers': 2, 'qkv_bias': 'qv'},
  'rotary positions without a class token': {'position': 'rope', 'pool': 'gap'},
  'a gated MLP': {'swiglu': True, 'layer_scale': 0.1, 'pool': 'map', 'gelu': 'erf'},
  'CLIP': {'pre_norm': True, 'gelu': 'quick', 'patch_bias': False, 'registers': 1},
  'norms of queries and keys': {'qk_norm': True, 'qkv_bias': 'none', 'position': 'relative'},
  'distilled DeiT': {'distillation_token': True},
  'distilled with rotary positions': {
    'distillation_token': True,
    'position': 'rope',
    'hidden_head': True,
  },
  'BEiT': {
    'position': 'relative2d',
    'qkv_bias': 'qv',
    'layer_scale': 0.1,
    'pool': 'gap',
    'class_token': True,
    'fc_norm': True,
  },
  'relative positions without a class token': {'position': 'relative2d', 'pool': 'gap'},
  'EVA-02': {
    'position': 'learned+rope',
    'rope_grid': 4,
    'swiglu': True,
    'mlp_norm': True,
    'pool': 'gap',
    'class_token': True,
    'fc_norm': True,
    'gelu': 'tanh',
  },
  'ViT-5': {
    'position': 'learned+rope',
    'rope_grid': 3,
    'rope_theta': 1e4,
    'registers': 4,
    'rope_register_theta': 50.0,
    'norm': 'rmsnorm',
    'qk_norm': True,
    'qkv_bias': 'none',
    'layer_scale': 0.1,
    'gelu': 'erf',
  },
  'RMSNorm everywhere': {
    'norm': 'rmsnorm',
    'patch_norm': True,
    'pre_norm': True,
    'mlp_norm': True,
    'pool': 'map',
    'norm_eps': 0.1,
  },
  'RMSNorm after pooling': {'norm': 'rmsnorm', 'pool': 'gap', 'fc_norm': True},
  'a norm after pooling': {'pool': 'gap', 'class_token': True, 'fc_norm': True},
  'a class token that is not pooled': {'pool': 'gap', 'class_token': True, 'position': 'learned2d'},
  'all at once': {
    'pool': 'map',
    'registers': 1,
    'patch_norm': True,
    'hidden_head': True,
    'norm_eps': 0.01,
    **IMAGENET,
  },
}


@pytest.mark.parametrize('fields', MODELS.values(), ids=MODELS)
def test_logits_equal_those_of_the_papers_equations(fields):
  config = ModelConfig(**SMALL, **fields)
  model = build_vit(config, CLASSES)
  params = random_params(model)
  logits = jit(model.apply)({'params': params}, images())
  expected = forward(params, images(), config, model.shape)
  assert logits.dtype == jnp.float32
  assert np.ptp(expected) > 1  # Otherwise the comparison would prove nothing.
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_float_and_uint8_pixels_give_the_same_logits():
  model = build_vit(ModelConfig(**SMALL, **IMAGENET), CLASSES)
  params = {'params': random_params(model)}
  apply = jit(model.apply)
  np.testing.assert_array_equal(apply(params, images()), apply(params, images().astype(np.float32)))


def test_an_image_that_patches_do_not_divide_is_an_error():
  model = build_vit(ModelConfig(**SMALL), CLASSES)
  with pytest.raises(UserError, match='10x12.*4x2'):
    abstract_params(model, (10, 12))


def gradients(config: ModelConfig):
  """Return the loss and gradients of a training step, always with the same parameters and key."""
  model = build_vit(config, CLASSES)
  params = jax.tree.map(lambda x: x / 2, random_params(model))
  targets = np.random.default_rng(8).normal(size=(3, CLASSES))

  def loss(params):
    logits = model.apply(
      {'params': params}, images(), train=True, rngs={'dropout': jax.random.key(1)}
    )
    return jnp.mean((logits - targets) ** 2)

  return jit(jax.value_and_grad(loss))(params)


def assert_same_arrays(tree, expected):
  """Assert that two trees are equal to 1e-5 of the largest value in all of them."""
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), tree, expected
  )


@pytest.fixture(scope='module')
def plain_gradients():
  return gradients(ModelConfig(**SMALL, dropout=0.1, drop_path=0.2))


@pytest.mark.parametrize(
  'fields',
  [{'remat': 'dots', 'unroll': 2}, {'remat': 'full', 'unroll': 0}, {'remat': 'vit'}],
  ids=str,
)
def test_remat_and_unroll_do_not_change_loss_and_gradients(fields, plain_gradients):
  expected, expected_grads = plain_gradients
  value, grads = gradients(ModelConfig(**SMALL, dropout=0.1, drop_path=0.2, **fields))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_same_arrays(grads, expected_grads)


def test_remat_policies_trade_memory_for_flops():
  """Memory falls and FLOPs rise from none to vit to full, with the body of a loop counted once."""

  def compiled(remat: str) -> tuple[float, float]:
    config = ModelConfig(variant='mu/4', width=64, mlp=256, heads=4, depth=8, remat=remat)
    model, rngs = build_vit(config, CLASSES), {'dropout': jax.random.key(1)}
    images = jax.ShapeDtypeStruct((32, 32, 32, 3), np.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    loss = lambda params, images: jnp.sum(model.apply(params, images, train=True, rngs=rngs) ** 2)
    program = jax.jit(jax.grad(loss)).lower(params, images).compile()
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()['flops']

  memory, flops = zip(*(compiled(remat) for remat in ('none', 'vit', 'full')), strict=True)
  assert memory[2] < 0.6 * memory[1] and memory[1] < 0.6 * memory[0]
  assert flops[0] < flops[1] < flops[0] + 0.4 * (flops[2] - flops[0])


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters():
  full, half = (
    build_vit(ModelConfig(**SMALL, hidden_head=True, dtype=dtype), CLASSES)
    for dtype in ('float32', 'bfloat16')
  )
  assert abstract_params(full, SIZE) == abstract_params(half, SIZE)
  assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half, SIZE))} == {
    jnp.dtype('float32')
  }
  params = {'params': random_params(full)}
  expected, logits = (np.asarray(jit(model.apply)(params, images())) for model in (full, half))
  assert logits.dtype == np.float32
  assert 1e-4 < np.abs(logits - expected).max() / expected.std() < 0.05
  # The tokens are in bfloat16.
  assert ':bf16[3,13,16]' in str(jax.make_jaxpr(half.apply)(params, images()))


def test_bfloat16_logits_far_from_zero_keep_small_differences():
  # A sigmoid head starts at a bias of -10. There, bfloat16 has steps of 1/16: more than
  # the first training steps learn.
  config = ModelConfig(**SMALL, hidden_head=True, dtype='bfloat16', head_bias=-10.0)
  model = build_vit(config, CLASSES)
  params = random_params(model)
  kernel, bias = params['head']['kernel'] / 100, np.full(CLASSES, -10, np.float32)
  params['head'] = {'kernel': kernel, 'bias': bias}
  apply = jax.jit(model.apply, compiler_options={'xla_allow_excess_precision': False})
  logits = apply({'params': params}, images())
  expected = forward(params, images(), model.config, model.shape)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


def test_evaluation_ignores_dropout_and_drop_path():
  plain, dropping = (
    build_vit(ModelConfig(**SMALL, dropout=rate, drop_path=rate), CLASSES) for rate in (0.0, 0.5)
  )
  params = {'params': random_params(plain)}
  np.testing.assert_array_equal(
    jit(plain.apply)(params, images()), jit(dropping.apply)(params, images())
  )


def quiet_transformer(config: ModelConfig, shape: ViTShape, x: np.ndarray):
  """Make a Transformer whose branches are zero.

  Returns its parameters by path, and a function of them that applies it in training.
  """
  module = Transformer(config, shape, (1, 1), jnp.float32)
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  shapes = jax.eval_shape(lambda: module.init(keys, x, None, True))['params']
  shapes = flatten_dict(shapes, sep='/')
  params = {
    path: np.full(leaf.shape, path.endswith('scale'), np.float32) for path, leaf in shapes.items()
  }
  apply = jit(lambda params: module.apply({'params': params}, x, None, True, rngs=keys))
  return params, lambda params: np.asarray(apply(unflatten_dict(params, sep='/')))


def tolerance(share, count: int):
  """Return five standard deviations of a share that is estimated from `count` draws."""
  return 5 * np.sqrt(share * (1 - share) / count)


ATTENTION, MLP = 'encoderblock/MultiHeadDotProductAttention_1/', 'encoderblock/MlpBlock_3/'
DROPOUTS = {
  # Parameters that put the same number everywhere before a dropout, and the share that it keeps.
  'after the positions': ({'posembed_input/pos_embedding': 1}, 0.7),
  'after the attention': ({ATTENTION + 'out/bias': 1}, 0.7),
  'after the MLP': ({MLP + 'Dense_1/bias': 1}, 0.7),
  'twice in the MLP': ({MLP + 'Dense_0/bias': 1, MLP + 'Dense_1/kernel': np.eye(32)}, 0.49),
}


@pytest.mark.parametrize(('ones', 'share'), DROPOUTS.values(), ids=DROPOUTS)
def test_every_dropout_keeps_its_share_of_elements(ones, share):
  x = np.zeros((200, 5, 32), np.float32)
  params, apply = quiet_transformer(ModelConfig(dropout=0.3), ViTShape(32, 1, 32, 1, (1, 1)), x)
  params |= {path: np.broadcast_to(one, params[path].shape) for path, one in ones.items()}
  kept = apply(params) > 0  # After the final norm, kept elements are positive and others negative.
  assert kept.mean() == pytest.approx(share, abs=tolerance(share, kept.size))
  for axis in range(3):  # Images, tokens and channels are independent.
    both = kept & np.roll(kept, 1, axis)
    assert both.mean() == pytest.approx(share**2, abs=2 * tolerance(share**2, kept.size))


def test_stochastic_depth_drops_images_at_linearly_growing_rates_and_keeps_the_mean():
  depth, rate, count = 4, 0.6, 3000
  x = np.zeros((count, 2, 16), np.float32)
  config = ModelConfig(position='none', drop_path=rate)
  params, apply = quiet_transformer(config, ViTShape(16, depth, 16, 1, (1, 1)), x)
  # Block i writes a 1 into channel i with its attention, and into channel 4 + i with its MLP. The
  # other channels stay 0.
  params[ATTENTION + 'out/bias'][:, :4] = np.eye(4)
  params[MLP + 'Dense_1/bias'][:, 4:8] = np.eye(4)
  out = apply(params).reshape(count, 2, 16)
  np.testing.assert_array_equal(out[:, 0], out[:, 1])  # Both tokens of an image are treated alike.
  # Undo the final norm: the first block is never dropped, so its channel is 1 above an unused one.
  branches = (out[:, 0, :8] - out[:, 0, 15:]) / (out[:, 0, :1] - out[:, 0, 15:])
  keep = 1 - np.tile([0, 0.2, 0.4, 0.6], 2)
  kept = branches > 0.5
  # A branch is scaled by 1 / keep or zero, at its own rate and independent of the others.
  np.testing.assert_allclose(np.where(kept, branches * keep, 1), 1, rtol=1e-4)
  np.testing.assert_allclose(np.where(kept, 0, branches), 0, atol=1e-4)
  assert np.all(np.abs(kept.mean(axis=0) - keep) <= tolerance(keep, count))
  correlation = np.corrcoef(kept[:, [1, 2, 3, 5, 6, 7]], rowvar=False) - np.eye(6)
  assert np.abs(correlation).max() < 5 / np.sqrt(count)


def test_uniform_stochastic_depth_drops_every_block_at_the_same_rate():
  """facebookresearch/deit, models_v2.py, has [rate] * depth."""
  depth, rate, count = 3, 0.6, 3000
  x = np.zeros((count, 2, 16), np.float32)
  config = ModelConfig(position='none', drop_path=rate, drop_path_schedule='uniform')
  params, apply = quiet_transformer(config, ViTShape(16, depth, 16, 1, (1, 1)), x)
  # Block i writes a 1 into channel i with its attention, and into channel 3 + i with its MLP.
  params[ATTENTION + 'out/bias'][:, :3] = np.eye(3)
  params[MLP + 'Dense_1/bias'][:, 3:6] = np.eye(3)
  out = apply(params)[:, 0]
  kept = out[:, :6] > out[:, 15:] + 1e-3  # Above a channel that nothing writes to.
  np.testing.assert_allclose(kept.mean(axis=0), 1 - rate, atol=tolerance(rate, count))
  correlation = np.corrcoef(kept, rowvar=False) - np.eye(6)
  assert np.abs(correlation).max() < 5 / np.sqrt(count)


def test_linear_drop_rates_are_those_of_timm(timm):
  ours = drop_path_rates(ModelConfig(drop_path=0.45), 24)
  theirs = timm.layers.calculate_drop_path_rates(0.45, 24)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'pool': 'gap'},
    {'pool': 'gap', 'class_token': True},
    {'pool': 'gap', 'registers': 3},
    {'registers': 3, 'distillation_token': True},
  ],
  ids=str,
)
def test_flops_are_those_of_the_matrix_products_of_all_tokens(fields):
  model = build_vit(ModelConfig(**SMALL | {'depth': 1}, attention='xla', **fields), 0)
  arguments = abstract_params(model, (8, 6)), jax.ShapeDtypeStruct((1, 8, 6, 3), np.uint8)
  run = lambda params, image: model.apply({'params': params}, image)
  products = 0
  for eqn in equations(jax.make_jaxpr(run)(*arguments).jaxpr):
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      terms = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
      products += int(np.prod(eqn.outvars[0].aval.shape) * terms)
  assert model.shape.flops((8, 6)) == 2 * products
