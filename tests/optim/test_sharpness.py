"""SAM and GSAM against their formulas in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import OptimConfig
from vit_jax.optim.optimizer import make_lr_schedule
from vit_jax.optim.sharpness import (
  forward_passes,
  make_rho_schedule,
  make_sharpness,
  sharpness_aware_gradient,
)

RNG = np.random.default_rng(0)
A = RNG.normal(size=(7, 7))
A = A @ A.T  # The loss is x·A·x / 2 of all seven parameters, and its gradient A·x.
X = RNG.normal(size=7)


def to_tree(x) -> dict:
  return {'a': {'kernel': x[:4].reshape(2, 2)}, 'b': {'bias': x[4:]}}


def gradient(tree: dict) -> dict:
  x = jnp.concatenate([tree['a']['kernel'].ravel(), tree['b']['bias']])
  return to_tree(A.astype(np.float32) @ x)


@pytest.mark.parametrize('alpha', [0.0, 0.6])
@pytest.mark.parametrize('rho', [0.05, 2.0])
def test_the_gradient_is_that_of_the_moved_parameters_minus_alpha_times_the_orthogonal_part(
  rho, alpha
):
  clean = A @ X
  robust = A @ (X + rho * clean / np.linalg.norm(clean))
  unit = robust / np.linalg.norm(robust)
  expected = robust - alpha * (clean - (clean @ unit) * unit)
  params = to_tree(X.astype(np.float32))
  actual = sharpness_aware_gradient(gradient, params, gradient(params), rho=rho, alpha=alpha)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(to_tree(expected)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_running_statistics_do_not_move_and_have_the_first_gradient():
  params = {'kernel': jnp.array([3.0]), 'running_mean': jnp.array([5.0])}
  seen = []

  def compute(params):
    seen.append(params)
    return {'kernel': params['kernel'] ** 2, 'running_mean': params['kernel']}

  first = {'kernel': jnp.array([9.0]), 'running_mean': jnp.array([100.0])}
  out = sharpness_aware_gradient(compute, params, first, rho=0.5, alpha=0.3)
  assert seen[0]['kernel'] == pytest.approx(3.5) and seen[0]['running_mean'] == 5.0
  assert out['running_mean'] == 100.0
  assert out['kernel'] == pytest.approx(3.5**2)  # One parameter has no orthogonal part.


def test_a_zero_gradient_moves_nothing():
  params = {'kernel': jnp.array([3.0, 0.0])}
  zero = {'kernel': jnp.zeros(2)}
  out = sharpness_aware_gradient(lambda p: p, params, zero, rho=0.5, alpha=0.5)
  np.testing.assert_allclose(out['kernel'], [3.0, 0.0])


def test_rho_follows_the_learning_rate_as_in_the_published_code():
  """From 0.6 at the peak to 0.1 at the end: 0.1 + 0.5 · (lr - lr_min) / (lr_max - lr_min)."""
  fields = {'lr': 3e-3, 'lr_end': 3e-5, 'schedule': 'linear', 'warmup': '10'}
  config = OptimConfig(**fields, sam_rho=0.6, sam_rho_min=0.1)
  lr = make_lr_schedule(config, steps=100, epoch=10.0)
  rho = make_rho_schedule(config, lr)
  for step in (0, 5, 10, 55, 100):
    expected = 0.1 + 0.5 * (float(lr(step)) - 3e-5) / (3e-3 - 3e-5)
    assert float(rho(step)) == pytest.approx(expected, rel=1e-5)
  assert float(rho(10)) == pytest.approx(0.6) and float(rho(100)) == pytest.approx(0.1)
  constant = make_rho_schedule(OptimConfig(**fields, sam_rho=0.6), lr)
  assert {float(constant(step)) for step in (0, 55, 100)} == {0.6}


def test_rho_is_never_negative_in_a_warm_up():
  """By the formula, 0.1 + 0.5 · (0 - 5e-4) / 5e-4 = -0.4 at step 0, and 0.1 at half of the peak."""
  config = OptimConfig(lr=1e-3, lr_end=5e-4, warmup='100', sam_rho=0.6, sam_rho_min=0.1)
  rho = make_rho_schedule(config, make_lr_schedule(config, steps=1000, epoch=100))
  assert [float(rho(step)) for step in (0, 10, 50, 100)] == pytest.approx([0, 0, 0.1, 0.6])


def test_without_rho_there_is_no_second_gradient():
  lr = optax.constant_schedule(0.1)
  assert make_sharpness(OptimConfig(), lr) is None
  assert (forward_passes(OptimConfig()), forward_passes(OptimConfig(sam_rho=0.1))) == (3, 6)
