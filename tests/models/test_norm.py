"""Running statistics are parameters that training keeps as a moving average, on any number of devices."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from vit_jax.config import OptimConfig
from vit_jax.models.layers import BATCH_NORM_EPSILON, BatchNorm
from vit_jax.optim.losses import softmax_loss
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated, to_global
from vit_jax.step import abstract_params, init_state, train_step

SIZE, STEPS, MOMENTUM = (4, 3), 5, 0.9


class Small(nn.Module):
  """A norm over pixels, and a head."""

  classes: int = 5

  @nn.compact
  def __call__(self, images, train=False):
    x = BatchNorm('float32', name='norm')(images.astype('float32') / 100, train)
    return nn.Dense(self.classes, name='head')(x.reshape(x.shape[0], -1))


def batches() -> list[dict]:
  rng = np.random.default_rng(0)
  image = lambda: rng.integers(0, 256, (16, *SIZE, 3), np.uint8)
  label = lambda: rng.integers(0, 5, (16, 1), np.int32)
  return [{'image': image(), 'label': label(), 'mask': np.arange(16) != k} for k in range(STEPS)]


def trained(devices: int, fsdp: int = 1, grad_accum_steps: int = 1, **fields):
  """(the parameters after each step, the gradients' norms)."""
  model, lr = Small(), optax.constant_schedule(0.1)
  config = OptimConfig(**{'name': 'sgd', 'norm_momentum': MOMENTUM} | fields)
  tx = make_optimizer(config, lr, abstract_params(model, SIZE))
  mesh = make_mesh(fsdp, batches={}, devices=jax.devices()[:devices])
  begin = functools.partial(init_state, 0, model=model, tx=tx, size=SIZE, ema=False)
  shardings = state_shardings(jax.eval_shape(begin), mesh)
  state = jax.jit(begin, out_shardings=shardings)()
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    loss=softmax_loss,
    lr=lr,
    seed=0,
    mesh=mesh,
    grad_accum_steps=grad_accum_steps,
  )
  update, history, norms = jax.jit(step, out_shardings=(shardings, replicated(mesh))), [], []
  for batch in batches():
    state, metrics = update(state, to_global(batch, mesh))
    history.append(jax.device_get(state.params))
    norms.append(float(metrics['grad_norm']))
  return history, norms


def expected() -> tuple[np.ndarray, np.ndarray]:
  """The moving averages in float64."""
  mean, var = np.zeros(3), np.ones(3)
  for batch in batches():
    x = batch['image'].astype(np.float64) / 100
    mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(axis=(0, 1, 2))
    var = MOMENTUM * var + (1 - MOMENTUM) * x.var(axis=(0, 1, 2))
  return mean, var


@pytest.mark.parametrize(
  'fields', [{}, {'grad_clip_norm': 1e-3, 'weight_decay': 0.5}, {'name': 'adamw'}], ids=str
)
def test_running_statistics_are_moving_averages_whatever_the_recipe(fields):
  params = trained(1, **fields)[0][-1]['norm']
  mean, var = expected()
  np.testing.assert_allclose(params['running_mean'], mean, rtol=1e-5)
  np.testing.assert_allclose(params['running_var'], var, rtol=1e-5)


@pytest.mark.parametrize('fsdp', [1, 8])
def test_eight_devices_equal_one(fsdp):
  """Statistics are of the whole batch: so are what is normalised with them, and its gradient."""
  (one, norms), (eight, same) = trained(1), trained(8, fsdp)
  np.testing.assert_allclose(same, norms, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, eight)


def test_a_batch_in_parts_moves_the_statistics_as_far_as_one_in_a_piece():
  """By the mean of the parts' statistics, each for the examples that count in it."""
  params = trained(1, grad_accum_steps=2)[0][0]['norm']
  batch = batches()[0]
  parts = [batch['image'][i::2].astype(np.float64) / 100 for i in range(2)]
  shares = [batch['mask'][i::2].sum() / batch['mask'].sum() for i in range(2)]
  mean = sum(share * x.mean(axis=(0, 1, 2)) for share, x in zip(shares, parts, strict=True))
  np.testing.assert_allclose(params['running_mean'], (1 - MOMENTUM) * mean, rtol=1e-5)


def test_statistics_count_in_no_gradient_norm_and_stay_where_frozen():
  history, norms = trained(1, frozen='norm/.*')
  assert norms[0] == pytest.approx(trained(1)[1][0], rel=1e-6)
  np.testing.assert_array_equal(history[-1]['norm']['running_mean'], 0)


def test_evaluation_normalises_with_the_running_statistics():
  x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
  params = {
    'scale': np.float32([1, 2, 3, 4]), 'bias': np.float32([0, 1, 0, 1]),
    'running_mean': np.float32([0, 1, 2, 3]), 'running_var': np.float32([1, 4, 9, 16]),
  }  # fmt: skip
  centred = (x - params['running_mean']) / np.sqrt(params['running_var'] + BATCH_NORM_EPSILON)
  ours = BatchNorm('float32').apply({'params': params}, x, False)
  np.testing.assert_allclose(ours, centred * params['scale'] + params['bias'], rtol=1e-5, atol=1e-5)
