"""Tests of the spike guard against the same rule in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.models.vit import build_vit
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.spike_guard import SpikeHistory, guard_spikes, is_spike
from vit_jax.step import init_state, train_step

WINDOW, DEVIATIONS = 8, 3.0
DISTURBANCES = {  # Value of the loss, and the steps that have it.
  'none': {},
  'a spike': {'spike': [30]},
  'spikes in a row': {'spike': [30, 31, 32]},
  'early': {'spike': [2]},
  'often': {'spike': [*range(20, 60, 5)]},
  'NaN': {'nan': [3, 25, 26, 40]},
  'infinities': {'inf': [12, 33]},
  'all kinds': {'nan': [5, 21, 36], '50': [22, 37], 'inf': [23, 45]},
}


def series(kind: str) -> np.ndarray:
  """Return the losses of 60 steps: slowly falling with noise, and disturbed at some steps."""
  rng = np.random.default_rng(0)
  losses = 3 - np.arange(60) / 40 + 0.05 * rng.normal(size=60)
  for value, steps in DISTURBANCES[kind].items():
    losses[steps] = losses[steps] + 10 if value == 'spike' else float(value)
  return losses.astype(np.float32)


def applied(losses: np.ndarray) -> list[bool]:
  """Return which steps are applied, from a history without a ring buffer."""
  history, out = [], []
  for loss in losses:
    last = history[-WINDOW:]
    spike = len(last) == WINDOW and loss > np.mean(last) + DEVIATIONS * np.std(last)
    out.append(bool(np.isfinite(loss) and not spike))
    history += [loss] if out[-1] else []
  return out


@pytest.fixture(scope='module')
def update():
  """Return a train step whose loss is the table entry of the label, and an initial state."""
  model = build_vit(ModelConfig(variant='mu/4', depth=1), 60)
  tx = guard_spikes(optax.adam(1e-3), WINDOW)

  def step(table, state, batch):
    loss = lambda logits, targets: table[targets.argmax(-1)] + 0 * logits.sum(-1)
    return train_step(
      state, batch, model=model, tx=tx, loss=loss, lr=lambda step: 1e-3, seed=0,
      skip_spikes=DEVIATIONS,
    )  # fmt: skip

  init = functools.partial(init_state, 0, model=model, tx=tx, size=(8, 8), ema=False)
  return jax.jit(step), jax.jit(init)()


@pytest.mark.parametrize('kind', DISTURBANCES)
def test_a_run_applies_the_same_steps_as_numpy(update, kind):
  step, state = update
  images, steps, table = np.zeros((1, 8, 8, 3), np.uint8), [], series(kind)
  for k in range(60):
    before = state
    batch = {'image': images, 'label': np.full((1, 1), k, np.int32), 'mask': np.ones(1, bool)}
    state, metrics = step(jnp.asarray(table), state, batch)
    steps.append(not (metrics['not_finite'] or metrics['spikes']))
    assert bool(metrics['not_finite']) == (not np.isfinite(table[k]))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), before.opt_state, state.opt_state)
    assert all(jax.tree.leaves(same)) is not steps[-1]
  assert steps == applied(table)
  history = state.opt_state.history
  assert np.isfinite(history.losses).all() and np.isfinite(history.norms).all()
  assert history.taken == sum(steps)


def test_a_guarded_optimizer_gives_the_same_updates_and_records_loss_and_norm():
  """Includes clipping, which needs the norm, and the learning rate, which needs the step."""
  params = {'a': np.float32([1, -2, 3]), 'b': np.float32([[4, 5]])}
  kwargs = {'step': 3, 'loss': jnp.float32(0.5), 'grad_norm': optax.tree.norm(params)}
  configs = [OptimConfig(grad_clip_norm=1.0, skip_spikes=skip) for skip in (0.0, DEVIATIONS)]
  plain, guarded = (make_optimizer(c, lambda step: 0.1 * step, params) for c in configs)
  expected, _ = plain.update(params, plain.init(params), params, **kwargs)
  updates, state = guarded.update(params, guarded.init(params), params, **kwargs)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), updates, expected))
  assert (state.history.losses[0], state.history.norms[0]) == (kwargs['loss'], kwargs['grad_norm'])


def test_a_loss_or_a_norm_far_above_the_mean_is_a_spike():
  # Mean 3.5, standard deviation 2.29.
  history = SpikeHistory(jnp.arange(8.0), jnp.arange(8.0), jnp.int32(8))
  spike = lambda loss, norm: bool(is_spike(history, jnp.float32(loss), jnp.float32(norm), 2.0))
  assert [spike(8.0, 8.0), spike(8.1, 0.0), spike(0.0, 8.1)] == [False, True, True]


def test_nothing_is_a_spike_until_the_window_is_full():
  history = SpikeHistory(jnp.zeros(8), jnp.zeros(8), jnp.int32(7))
  assert not is_spike(history, jnp.float32(1e9), jnp.float32(1e9), 2.0)
