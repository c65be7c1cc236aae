"""Tests of attention against its equation in NumPy and float64, and of the choice of a kernel."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import DataConfig, ModelConfig
from vit_jax.data.loader import train_batches
from vit_jax.data.sources import open_source
from vit_jax.kernels import attention as attention_kernel
from vit_jax.models import attention
from vit_jax.models.attention import attend, is_kernel_accurate
from vit_jax.models.rope import RotaryPositions
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from vit_jax.step import init_state, train_step


def equation(q, k, v):
  """Compute softmax(q kᵀ / √c) v one image and head at a time, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b in range(q.shape[0]):
    for head in range(q.shape[2]):
      scores = q[b, :, head] @ k[b, :, head].T / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      out[b, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, head]
  return out


def draw(*, queries: int, keys: int, heads: int, channels: int, scale: float = 1.0):
  rng = np.random.default_rng(queries + keys + heads + channels)
  make = lambda n: (scale * rng.normal(size=(2, n, heads, channels))).astype(np.float32)
  return make(queries), make(keys), make(keys)


@pytest.mark.parametrize(
  ('queries', 'keys', 'heads', 'channels'),
  [(9, 9, 3, 8), (1, 17, 2, 5), (7, 4, 1, 16), (5, 1, 2, 3)],
)
def test_attention_equals_the_equation(queries, keys, heads, channels):
  q, k, v = draw(queries=queries, keys=keys, heads=heads, channels=channels)
  np.testing.assert_allclose(attend(q, k, v), equation(q, k, v), rtol=0, atol=2e-6)


def test_large_scores_do_not_overflow():
  q, k, v = draw(queries=6, keys=6, heads=2, channels=4, scale=100)
  out = np.asarray(attend(q, k, v))
  np.testing.assert_allclose(out, equation(q, k, v), rtol=1e-3, atol=1e-3)


def test_attention_in_bfloat16_computes_its_softmax_in_float32():
  # 200 keys with scores around 40: in bfloat16, scores that differ by less than 0.25 are equal.
  rng = np.random.default_rng(0)
  q = np.full((1, 1, 1, 16), 8.0)
  k = 5.0 + rng.choice([-1 / 16, 0, 1 / 16], size=(1, 200, 1, 16))
  v = rng.normal(size=(1, 200, 1, 16))
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  out = attend(q, k, v)
  assert out.dtype == jnp.bfloat16
  # The weights are rounded to bfloat16 (2^-9 relative) and so is the result.
  np.testing.assert_allclose(np.asarray(out, np.float64), equation(q, k, v), rtol=0, atol=1.5e-3)


def test_gradients_equal_the_finite_differences_of_the_equation():
  q, k, v = draw(queries=4, keys=5, heads=2, channels=3)
  weights = np.random.default_rng(1).normal(size=q.shape)
  grads = jax.grad(lambda *args: jnp.sum(attend(*args) * weights), argnums=(0, 1, 2))(q, k, v)
  for i, grad in enumerate(grads):
    direction = np.random.default_rng(2 + i).normal(size=grad.shape)
    values = []
    for moved in (1e-5 * direction, -1e-5 * direction):
      args = [np.asarray(x, np.float64) for x in (q, k, v)]
      args[i] = args[i] + moved
      values.append(np.sum(equation(*args) * weights))
    assert np.sum(np.asarray(grad) * direction) == pytest.approx(
      (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize('rope', [None, RotaryPositions((2, 2), 1, 100.0)])
def test_an_accurate_kernel_causes_no_warning(rope):
  assert is_kernel_accurate(5, 16, 2, rope)


def test_the_kernel_and_xla_agree_with_rotary_positions():
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
  logits = []
  for implementation in ('xla', 'pallas'):
    config = ModelConfig(variant='mu/4', position='rope', attention=implementation)
    model = build_vit(config, 0)
    params = model.init(jax.random.key(0), images)
    logits.append(model.apply(params, images))
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fault', [1.1, np.nan], ids=['10 % off', 'NaN'])
def test_an_inaccurate_kernel_is_rejected_with_a_warning(monkeypatch, fault):
  correct = attention_kernel.fused_attention
  wrong = lambda *args, **kwargs: fault * correct(*args, **kwargs)
  monkeypatch.setattr(attention_kernel, 'fused_attention', wrong)
  with pytest.warns(UserWarning, match='6 tokens in 2 heads of 8'):
    assert not is_kernel_accurate.__wrapped__(6, 16, 2)


@pytest.mark.parametrize(
  ('target', 'dtype', 'c', 'accurate', 'expected'),
  [
    (('tpu', 'TPU v5 lite'), 'bfloat16', 64, True, 'pallas'),
    (('tpu', 'TPU v5 lite'), 'bfloat16', 64, False, 'xla'),
    (('tpu', 'TPU v5 lite'), 'float32', 64, True, 'xla'),
    (('gpu', 'NVIDIA H100'), 'bfloat16', 64, True, 'cudnn'),
    (('cuda', 'NVIDIA H100'), 'bfloat16', 128, True, 'cudnn'),
    (('gpu', 'NVIDIA H100'), 'bfloat16', 136, True, 'xla'),
    (('gpu', 'NVIDIA H100'), 'bfloat16', 60, True, 'xla'),
    (('gpu', 'NVIDIA H100'), 'float32', 64, True, 'xla'),
    (('cpu', 'cpu'), 'bfloat16', 64, True, 'xla'),
  ],
)
def test_auto_chooses_a_kernel_that_supports_the_shape(
  monkeypatch, target, dtype, c, accurate, expected
):
  monkeypatch.setattr(attention, 'compilation_target', lambda: target)
  monkeypatch.setattr(attention, 'is_kernel_accurate', lambda n, d, heads, rope: accurate)
  monkeypatch.setattr(jax, 'default_backend', lambda: target[0])
  x = jax.ShapeDtypeStruct((2, 17, 3 * 2 * c), dtype)
  assert attention.choose_implementation(x, 2) == expected


def test_the_pallas_kernel_splits_a_global_batch_over_the_mesh():
  model = build_vit(ModelConfig(variant='mu/4', attention='pallas'), classes=3)
  images = np.zeros((8, 8, 8, 3), np.uint8)
  params = model.init(jax.random.key(0), images[:1])
  mesh = make_mesh(1, batches={})
  apply = jax.jit(
    model.apply,
    in_shardings=(replicated(mesh), batch_sharding(mesh)),
    out_shardings=batch_sharding(mesh),
  )
  with jax.set_mesh(mesh):
    split = apply(params, images)
    assert 'manual_computation' in apply.lower(params, images).as_text()
  assert 'manual_computation' not in apply.lower(params, images).as_text()
  np.testing.assert_allclose(split, model.apply(params, images), rtol=0, atol=1e-6)


def losses(implementation: str, batches: dict) -> np.ndarray:
  """Train a small model with 17 tokens in bfloat16 on stacked batches; return the loss per step."""
  config = ModelConfig(variant='mu/4', attention=implementation, dtype='bfloat16')
  model, tx = build_vit(config, 10), optax.adamw(1e-3)
  step = functools.partial(
    train_step, model=model, tx=tx, loss=softmax_loss, lr=lambda step: 1e-3, seed=0
  )
  start = jax.jit(functools.partial(init_state, 0, model=model, tx=tx, size=(16, 16), ema=False))()
  run = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[1]['loss'])
  return np.asarray(run(start, batches))


def test_a_model_in_bfloat16_learns_the_same_with_pallas_and_xla():
  config = DataConfig(train='builtin:digits', batch=32, size=(16, 16), crop='resize', flip=False)
  batches = train_batches(
    open_source(config.train, 'train'), config, seed=0, start=0, host=0, hosts=1
  )
  stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *itertools.islice(batches, 100))
  pallas, xla = (losses(implementation, stacked) for implementation in ('pallas', 'xla'))
  assert not np.array_equal(pallas, xla)  # The two programs differ.
  assert xla[-10:].mean() < 0.8 * xla[0]
  np.testing.assert_allclose(pallas, xla, rtol=1e-2)
