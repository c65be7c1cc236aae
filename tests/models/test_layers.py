"""Tests of shared layers: running statistics, dropout and the input range."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.models.layers import (
  BATCH_NORM_EPSILON,
  BatchNorm,
  apply_drop_path,
  apply_dropout,
  normalize_images,
)
from vit_jax.optim.losses import softmax_loss
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated, to_global
from vit_jax.step import abstract_params, init_state, train_step

SIZE, STEPS, MOMENTUM = (4, 3), 5, 0.9


def test_images_are_normalized_channel_by_channel():
  pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
  config = ModelConfig(mean=(1.0, 2.0, 3.0), scale=(2.0, 4.0, 8.0))
  x = normalize_images(pixels, config)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x[0, 0, 1], [(3 - 1) / 2, (4 - 2) / 4, (5 - 3) / 8])


@pytest.mark.parametrize('drop', [apply_dropout, apply_drop_path], ids=['elements', 'images'])
def test_dropout_scales_what_it_keeps_and_its_gradient_has_the_same_mask(drop):
  x = jnp.ones((400, 5))
  function = lambda x: drop(x, jax.random.key(0), rate=0.2)
  out, vjp = jax.vjp(function, x)
  assert set(np.unique(out)) == {0.0, 1.25}
  np.testing.assert_array_equal(vjp(x)[0], out)
  kept = (np.asarray(out) > 0).mean()
  assert kept == pytest.approx(0.8, abs=5 * np.sqrt(0.8 * 0.2 / 400))


class SmallModel(nn.Module):
  """A batch norm over pixels, and a head."""

  classes: int = 5

  @property
  def config(self) -> ModelConfig:
    """The settings that every model has."""
    return ModelConfig()

  @nn.compact
  def __call__(self, images, train=False):
    x = BatchNorm('float32', name='norm')(images.astype('float32') / 100, train)
    return nn.Dense(self.classes, name='head')(x.reshape(x.shape[0], -1))


def batches() -> list[dict]:
  rng = np.random.default_rng(0)
  image = lambda: rng.integers(0, 256, (16, *SIZE, 3), np.uint8)
  label = lambda: rng.integers(0, 5, (16, 1), np.int32)
  return [{'image': image(), 'label': label(), 'mask': np.arange(16) != k} for k in range(STEPS)]


def train(devices: int, fsdp: int = 1, grad_accum_steps: int = 1, **fields):
  """Return the parameters after each step, and the gradient norms."""
  model, lr = SmallModel(), optax.constant_schedule(0.1)
  config = OptimConfig(**{'name': 'sgd', 'norm_momentum': MOMENTUM} | fields)
  tx = make_optimizer(config, lr, abstract_params(model, SIZE))
  mesh = make_mesh(fsdp, batches={}, devices=jax.devices()[:devices])
  begin = functools.partial(init_state, 0, model=model, tx=tx, size=SIZE, ema=False)
  shardings = state_shardings(jax.eval_shape(begin), mesh)
  state = jax.jit(begin, out_shardings=shardings)()
  step = functools.partial(
    train_step, model=model, tx=tx, loss=softmax_loss, lr=lr, seed=0, mesh=mesh,
    grad_accum_steps=grad_accum_steps,
  )  # fmt: skip
  update, history, norms = jax.jit(step, out_shardings=(shardings, replicated(mesh))), [], []
  for batch in batches():
    state, metrics = update(state, to_global(batch, mesh))
    history.append(jax.device_get(state.params))
    norms.append(float(metrics['grad_norm']))
  return history, norms


def moving_averages() -> tuple[np.ndarray, np.ndarray]:
  """Return the moving averages of mean and variance in float64."""
  mean, var = np.zeros(3), np.ones(3)
  for batch in batches():
    x = batch['image'].astype(np.float64) / 100
    mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(axis=(0, 1, 2))
    var = MOMENTUM * var + (1 - MOMENTUM) * x.var(axis=(0, 1, 2))
  return mean, var


@pytest.mark.parametrize(
  'fields', [{}, {'grad_clip_norm': 1e-3, 'weight_decay': 0.5}, {'name': 'adamw'}], ids=str
)
def test_running_statistics_are_moving_averages_under_every_optimizer(fields):
  params = train(1, **fields)[0][-1]['norm']
  mean, var = moving_averages()
  np.testing.assert_allclose(params['running_mean'], mean, rtol=1e-5)
  np.testing.assert_allclose(params['running_var'], var, rtol=1e-5)


@pytest.mark.parametrize('fsdp', [1, 8])
def test_batch_norm_on_eight_devices_equals_one(fsdp):
  """Statistics, normalized values and gradients are of the global batch."""
  (one, norms), (eight, same) = train(1), train(8, fsdp)
  np.testing.assert_allclose(same, norms, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, eight)


def test_gradient_accumulation_moves_statistics_by_the_weighted_mean_of_microbatches():
  """The weight of a microbatch is the number of its examples that count."""
  params = train(1, grad_accum_steps=2)[0][0]['norm']
  batch = batches()[0]
  parts = [batch['image'][i::2].astype(np.float64) / 100 for i in range(2)]
  weights = [batch['mask'][i::2].sum() / batch['mask'].sum() for i in range(2)]
  mean = sum(weight * x.mean(axis=(0, 1, 2)) for weight, x in zip(weights, parts, strict=True))
  np.testing.assert_allclose(params['running_mean'], (1 - MOMENTUM) * mean, rtol=1e-5)


def test_frozen_statistics_stay_and_the_gradient_norm_excludes_statistics():
  default = OptimConfig().norm_momentum  # Another value would be an error: it has no effect.
  history, norms = train(1, freeze='norm/.*', norm_momentum=default)
  assert norms[0] == pytest.approx(train(1)[1][0], rel=1e-6)
  np.testing.assert_array_equal(history[-1]['norm']['running_mean'], 0)


def test_evaluation_normalizes_with_the_running_statistics():
  x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
  params = {
    'scale': np.float32([1, 2, 3, 4]), 'bias': np.float32([0, 1, 0, 1]),
    'running_mean': np.float32([0, 1, 2, 3]), 'running_var': np.float32([1, 4, 9, 16]),
  }  # fmt: skip
  centered = (x - params['running_mean']) / np.sqrt(params['running_var'] + BATCH_NORM_EPSILON)
  out = BatchNorm('float32').apply({'params': params}, x, False)
  np.testing.assert_allclose(out, centered * params['scale'] + params['bias'], rtol=1e-5, atol=1e-5)
