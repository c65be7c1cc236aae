"""Muon against `torch.optim.Muon`, matrix by matrix, and the parameters that it leaves to Adam."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.models.vit import build_vit
from vit_jax.optim.muon import label_by_rule, orthogonalize, orthogonalize_kernel
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.step import abstract_params

BLOCK = 'Transformer/encoderblock/'
ATTENTION = f'{BLOCK}MultiHeadDotProductAttention_1/'
DEPTH, STEPS = 3, 5
# Path -> shape, and the number of axes that are inputs, without the depth.
KERNELS = {
  f'{ATTENTION}query/kernel': ((DEPTH, 24, 4, 6), 1),
  f'{ATTENTION}out/kernel': ((DEPTH, 4, 6, 24), 2),
  f'{BLOCK}MlpBlock_3/Dense_0/kernel': ((DEPTH, 24, 40), 1),
  f'{BLOCK}MlpBlock_3/Dense_1/kernel': ((DEPTH, 40, 24), 1),
  'MAPHead_0/MultiHeadDotProductAttention_0/key/kernel': ((24, 4, 6), 1),
  'pre_logits/kernel': ((24, 24), 1),
}


@pytest.fixture
def torch(monkeypatch):
  """Return the module torch, whose Muon computes in float32 instead of in bfloat16."""
  torch = pytest.importorskip('torch')
  monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda tensor: tensor.clone())
  return torch


def to_matrices(array: np.ndarray, path: str) -> list[np.ndarray]:
  """Return the matrices [outputs, inputs] of the blocks of a kernel, as PyTorch has them."""
  shape, split = KERNELS[path]
  blocks = array if path.startswith(BLOCK) else array[None]
  inputs = int(np.prod(shape[path.startswith(BLOCK) :][:split]))
  return [block.reshape(inputs, -1).T.copy() for block in blocks]


def test_muon_equals_torchs_for_each_block_and_projection(torch):
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  flat = {path: draw(shape) for path, (shape, _) in KERNELS.items()}
  gradients = [{path: draw(x.shape) for path, x in flat.items()} for _ in range(STEPS)]
  matrices = {
    path: [torch.nn.Parameter(torch.tensor(x)) for x in to_matrices(flat[path], path)]
    for path in KERNELS
  }
  theirs = torch.optim.Muon(
    [p for tensors in matrices.values() for p in tensors],
    lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn='match_rms_adamw',
  )  # fmt: skip
  params = flax.traverse_util.unflatten_dict(flat, sep='/')
  config = OptimConfig(name='muon', muon_momentum=0.9, weight_decay=0.2)
  tx = make_optimizer(config, optax.constant_schedule(0.1), params)
  state, update = tx.init(params), jax.jit(tx.update)
  for step, gradient in enumerate(gradients):
    grads = flax.traverse_util.unflatten_dict(gradient, sep='/')
    updates, state = update(grads, state, params, step=step)
    params = optax.apply_updates(params, updates)
    for path, tensors in matrices.items():
      for tensor, grad in zip(tensors, to_matrices(gradient[path], path), strict=True):
        tensor.grad = torch.tensor(grad)
    theirs.step()
  for path, ours in flax.traverse_util.flatten_dict(params, sep='/').items():
    for x, tensor in zip(to_matrices(np.asarray(ours), path), matrices[path], strict=True):
      np.testing.assert_allclose(x, tensor.detach().numpy(), rtol=0, atol=5e-4, err_msg=path)
    assert np.abs(ours - flat[path]).max() > 0.1


def test_a_matrix_gets_singular_values_near_one_times_the_rms_of_adam():
  x = np.random.default_rng(0).normal(size=(2, 30, 50)).astype(np.float32)
  s = np.linalg.svd(orthogonalize(x), compute_uv=False) / (0.2 * np.sqrt(50))
  assert s.min() > 0.6 and s.max() < 1.3
  rms = np.sqrt(np.mean(np.square(orthogonalize(x))))
  assert 0.1 < rms < 0.25


def test_a_fused_kernel_is_three_matrices():
  """Axial ResNets have q, k and v of widths 1, 1 and 2 for each of 8 heads."""
  kernel = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
  heads = kernel.reshape(32, 8, 8)
  expected = np.zeros_like(heads)
  for part in (slice(0, 2), slice(2, 4), slice(4, 8)):
    matrix = heads[:, :, part]
    expected[:, :, part] = orthogonalize(matrix.reshape(32, -1)).reshape(matrix.shape)
  actual = orthogonalize_kernel('block1/unit1/row/qkv/kernel', jnp.asarray(kernel))
  np.testing.assert_allclose(actual, expected.reshape(32, 64), rtol=1e-5, atol=1e-6)


def labels(config: ModelConfig, size=(32, 32)) -> dict[str, str]:
  params = abstract_params(build_model(config, 5), size)
  return flax.traverse_util.flatten_dict(label_by_rule(params), sep='/')


@pytest.mark.parametrize('pool', ['token', 'gap', 'map'])
def test_only_kernels_between_embedding_and_head_are_orthogonalized(pool):
  config = ModelConfig(
    variant='mu/4', depth=2, heads=2, pool=pool, hidden_head=True, registers=2, layer_scale=0.1,
    swiglu=True, qk_norm=True, patch_norm=True,
  )  # fmt: skip
  found = labels(config)
  attention, mlp = ('query', 'key', 'value', 'out'), ('Dense_0', 'Dense_1', 'Gate')
  expected = {f'{ATTENTION}{name}/kernel' for name in attention} | {'pre_logits/kernel'}
  expected |= {f'{BLOCK}MlpBlock_3/{name}/kernel' for name in mlp}
  if pool == 'map':
    prefix = 'MAPHead_0/MultiHeadDotProductAttention_0'
    expected |= {f'{prefix}/{name}/kernel' for name in attention}
    expected |= {f'MAPHead_0/MlpBlock_0/{name}/kernel' for name in mlp[:2]}
  assert {path for path, rule in found.items() if rule == 'muon'} == expected
  assert {'head/kernel', 'embedding/kernel', 'Transformer/posembed_input/pos_embedding'} <= {
    path for path, rule in found.items() if rule == 'adam'
  }


def test_convolutions_get_adam():
  found = labels(ModelConfig(variant='R1.1+Ti/8', depth=1))
  convolutions = {path for path in found if re.search(r'conv\w*/kernel', path)}
  assert convolutions and {found[path] for path in convolutions} == {'adam'}


def test_all_else_follows_adamw():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'pre_logits': {'kernel': draw(4, 4)}, 'head': {'kernel': draw(4, 3), 'bias': draw(3)}}
  config = OptimConfig(name='muon', b1=0.8, b2=0.9, weight_decay=0.1, grad_clip_norm=1.0)
  ours = make_optimizer(config, optax.constant_schedule(0.1), params)
  adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, 0.8, 0.9, weight_decay=0.1))
  state, other, theirs = ours.init(params), adamw.init(params), params
  for step in range(3):
    grads = jax.tree.map(lambda x: draw(*x.shape), params)
    updates, state = ours.update(grads, state, params, step=step, grad_norm=optax.tree.norm(grads))
    params = optax.apply_updates(params, updates)
    updates, other = adamw.update(grads, other, theirs)
    theirs = optax.apply_updates(theirs, updates)
  for name in ('kernel', 'bias'):
    np.testing.assert_allclose(params['head'][name], theirs['head'][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('freeze', ['', 'Transformer/.*'])
def test_muon_without_a_matrix_to_train_is_an_error(freeze):
  model = build_vit(ModelConfig(variant='mu/4', depth=1), 5)
  params = abstract_params(model, (8, 8)) if freeze else {'head': {'kernel': np.zeros((4, 4))}}
  with pytest.raises(UserError, match=r"config\.optim\.name='muon'"):
    config = OptimConfig(name='muon', freeze=freeze)
    make_optimizer(config, optax.constant_schedule(0.1), params)


def test_frozen_blocks_have_no_momentum():
  model = build_vit(ModelConfig(variant='mu/4', depth=2), 5)
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_params(model, (8, 8)))
  config = OptimConfig(
    name='muon', freeze='.*MlpBlock_3.*|embedding/.*', momentum_dtype='bfloat16', layer_decay=0.5
  )
  tx = make_optimizer(config, optax.constant_schedule(0.1), params)
  state = tx.init(params)
  paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(state)]
  assert not [path for path in paths if 'MlpBlock_3' in path or 'embedding/' in path]
  halves = {
    leaf.dtype
    for path, leaf in zip(paths, jax.tree.leaves(state), strict=True)
    if 'trace' in path or "mu'" in path
  }
  assert halves <= {jnp.dtype('bfloat16')} and halves
  updates, _ = tx.update(params, state, params, step=0)
  assert not np.any(updates['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel'])
  query = updates['Transformer']['encoderblock']['MultiHeadDotProductAttention_1']['query']
  first, last = (np.linalg.norm(query['kernel'][i]) for i in range(2))
  assert last == pytest.approx(2 * first, rel=1e-5)  # The layer decay is applied to each block.
