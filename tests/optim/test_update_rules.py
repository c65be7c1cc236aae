"""LAMB and Lion against timm's, which has a tensor for each block."""

import importlib

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from vit_jax.config import OptimConfig
from vit_jax.errors import UserError
from vit_jax.optim.optimizer import make_optimizer

BLOCK = 'Transformer/encoderblock/'
# The depth of four blocks is the leading axis.
SHAPES = {
  f'{BLOCK}MultiHeadDotProductAttention_1/query/kernel': (4, 6, 2, 3),
  f'{BLOCK}MlpBlock_3/Dense_0/kernel': (4, 6, 5),
  f'{BLOCK}MlpBlock_3/Dense_0/bias': (4, 5),
  f'{BLOCK}LayerNorm_0/scale': (4, 6),
  'cls': (1, 1, 6),
  'head/kernel': (6, 3),
  'head/bias': (3,),
}


def draw(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  # Blocks differ in scale, and so in their trust ratios.
  scale = lambda path, shape: (
    10.0 ** np.arange(4).reshape(4, *[1] * (len(shape) - 1)) if path.startswith(BLOCK) else 1.0
  )
  return {
    path: (scale(path, shape) * rng.normal(size=shape)).astype(np.float32)
    for path, shape in SHAPES.items()
  }


def run_ours(config: OptimConfig, flat: dict, gradients: list[dict]) -> dict[str, np.ndarray]:
  unflatten = lambda tree: flax.traverse_util.unflatten_dict(tree, sep='/')
  params = unflatten(flat)
  tx = make_optimizer(config, optax.constant_schedule(0.02), params)
  state, update = tx.init(params), jax.jit(tx.update)
  for step, gradient in enumerate(gradients):
    norm = optax.tree.norm(gradient)
    updates, state = update(unflatten(gradient), state, params, step=step, grad_norm=norm)
    params = optax.apply_updates(params, updates)
  return flax.traverse_util.flatten_dict(jax.device_get(params), sep='/')


def run_theirs(make, flat: dict, gradients: list[dict], decays) -> dict[str, np.ndarray]:
  """Return the parameters after steps of `make(groups)`, with a tensor for each block."""
  import torch

  blocks = lambda path, x: list(x) if path.startswith(BLOCK) else [x]
  tensors = {
    path: [torch.nn.Parameter(torch.tensor(row)) for row in blocks(path, x)]
    for path, x in flat.items()
  }
  optimizer = make(
    [{'params': rows, 'weight_decay': 0.1 * decays(path)} for path, rows in tensors.items()]
  )
  for gradient in gradients:
    for path, rows in tensors.items():
      for tensor, grad in zip(rows, blocks(path, gradient[path]), strict=True):
        tensor.grad = torch.tensor(grad)
    torch.nn.utils.clip_grad_norm_([x for rows in tensors.values() for x in rows], 1.0)
    optimizer.step()
  return {
    path: np.stack([x.detach().numpy() for x in rows]).reshape(SHAPES[path])
    for path, rows in tensors.items()
  }


DECAYED = {'.*/kernel': lambda path: path.endswith('kernel'), '.*': lambda path: True}


@pytest.mark.parametrize('mask', DECAYED)
@pytest.mark.parametrize('name', ['lamb', 'lion'])
def test_each_block_has_the_update_of_timms_optimizer(name, mask, timm):
  optim = importlib.import_module('timm.optim')
  flat, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
  config = OptimConfig(
    name=name, b2=0.99, weight_decay=0.1, weight_decay_mask=mask, grad_clip_norm=1.0
  )
  make = {
    'lamb': lambda groups: optim.Lamb(groups, lr=0.02, betas=(0.9, 0.99), max_grad_norm=None),
    'lion': lambda groups: optim.Lion(groups, lr=0.02, betas=(0.9, 0.99)),
  }[name]
  ours = run_ours(config, flat, gradients)
  theirs = run_theirs(make, flat, gradients, DECAYED[mask])
  for path in SHAPES:
    np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_without_weight_decay_lamb_still_adapts_what_the_mask_matches(timm):
  """The reference is timm's always_adapt=True, without which its LAMB would be Adam here."""
  optim = importlib.import_module('timm.optim')
  flat, gradients = draw(0), [draw(seed) for seed in (1, 2)]
  config = OptimConfig(name='lamb', b2=0.99, grad_clip_norm=1.0)
  theirs = run_theirs(
    lambda groups: optim.Lamb(
      groups, lr=0.02, betas=(0.9, 0.99), max_grad_norm=None, always_adapt=True
    ),
    *(flat, gradients, lambda path: 0.0),
  )
  for path, x in run_ours(config, flat, gradients).items():
    np.testing.assert_allclose(x, theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_parameter_of_zeros_has_the_trust_ratio_one():
  flat = {'head/kernel': np.zeros((4, 3), np.float32), 'cls': np.ones((1, 4), np.float32)}
  params = flax.traverse_util.unflatten_dict(flat, sep='/')
  tx = make_optimizer(OptimConfig(name='lamb'), optax.constant_schedule(0.1), params)
  grads = jax.tree.map(np.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params, step=0)
  np.testing.assert_allclose(updates['head']['kernel'], -0.1, rtol=1e-4)  # Adam's first step.
  np.testing.assert_allclose(updates['cls'], -0.1, rtol=1e-4)  # Both norms are 2.
  zeros = jax.tree.map(np.zeros_like, params)
  assert not np.any(tx.update(zeros, tx.init(params), params, step=0)[0]['cls'])


def test_lambs_mask_must_match_a_parameter():
  config = OptimConfig(name='lamb', weight_decay_mask='kernel')
  with pytest.raises(UserError, match=r'config\.optim\.weight_decay_mask'):
    make_optimizer(config, optax.constant_schedule(0.1), {'head': {'kernel': np.zeros((2, 2))}})
