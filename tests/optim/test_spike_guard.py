"""Which steps are out of line, against NumPy; and that what is no number does not stay in the history."""

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


def series(kind: str) -> np.ndarray:
  """The losses of 60 steps: a slow fall with noise, and something in it."""
  rng = np.random.default_rng(0)
  losses = 3 - np.arange(60) / 40 + 0.05 * rng.normal(size=60)
  losses[
    {'a spike': [30], 'spikes in a row': [30, 31, 32], 'early': [2], 'often': range(20, 60, 5)}.get(
      kind, []
    )
  ] += 10
  losses[{'NaN': [3, 25, 26, 40], 'infinities': [12, 33]}.get(kind, [])] = (
    np.nan if kind == 'NaN' else np.inf
  )
  if kind == 'everything':
    losses[[5, 21, 36]], losses[[22, 37]], losses[[23, 45]] = np.nan, 50, np.inf
  return losses.astype(np.float32)


def taken(losses: np.ndarray) -> list[bool]:
  """The rule, in NumPy and without a ring."""
  history, out = [], []
  for loss in losses:
    last = history[-WINDOW:]
    spike = len(last) == WINDOW and loss > np.mean(last) + DEVIATIONS * np.std(last)
    out.append(bool(np.isfinite(loss) and not spike))
    history += [loss] if out[-1] else []
  return out


@pytest.fixture(scope='module')
def update():
  """A step whose loss is what the label says of a table of 60, and a state to start from."""
  model, tx = (
    build_vit(ModelConfig(variant='mu/4', depth=1), 60),
    guard_spikes(optax.adam(1e-3), WINDOW),
  )

  def step(table, state, batch):
    loss = lambda logits, targets: table[targets.argmax(-1)] + 0 * logits.sum(-1)
    return train_step(
      state,
      batch,
      model=model,
      tx=tx,
      loss=loss,
      lr=lambda step: 1e-3,
      seed=0,
      skip_spikes=DEVIATIONS,
    )

  return jax.jit(step), jax.jit(
    functools.partial(init_state, 0, model=model, tx=tx, size=(8, 8), ema=False)
  )()


@pytest.mark.parametrize(
  'kind',
  ['nothing', 'a spike', 'spikes in a row', 'early', 'often', 'NaN', 'infinities', 'everything'],
)
def test_a_run_takes_the_steps_that_numpy_takes(update, kind):
  step, state = update
  images, found, table = np.zeros((1, 8, 8, 3), np.uint8), [], series(kind)
  for k in range(60):
    before = state
    batch = {'image': images, 'label': np.full((1, 1), k, np.int32), 'mask': np.ones(1, bool)}
    state, metrics = step(jnp.asarray(table), state, batch)
    found.append(not (metrics['not_finite'] or metrics['spikes']))
    assert bool(metrics['not_finite']) == (not np.isfinite(table[k]))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), before.opt_state, state.opt_state)
    assert all(jax.tree.leaves(same)) is not found[-1]
  assert found == taken(table)
  assert (
    np.isfinite(state.opt_state.history.losses).all()
    and np.isfinite(state.opt_state.history.norms).all()
  )
  assert state.opt_state.history.taken == sum(found)


def test_an_optimizer_that_is_watched_updates_as_one_that_is_not():
  """Clipping, which is told the norm, and the rate, which is told the step, among the rest."""
  params = {'a': np.float32([1, -2, 3]), 'b': np.float32([[4, 5]])}
  told = {'step': 3, 'loss': jnp.float32(0.5), 'grad_norm': optax.tree.norm(params)}
  plain, watchful = (
    make_optimizer(
      OptimConfig(grad_clip_norm=1.0, skip_spikes=skip), lambda step: 0.1 * step, params
    )
    for skip in (0.0, DEVIATIONS)
  )
  expected, _ = plain.update(params, plain.init(params), params, **told)
  found, state = watchful.update(params, watchful.init(params), params, **told)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, expected))
  assert (state.history.losses[0], state.history.norms[0]) == (told['loss'], told['grad_norm'])


def test_a_norm_out_of_line_is_a_spike_too():
  history = SpikeHistory(
    jnp.arange(8.0), jnp.arange(8.0), jnp.int32(8)
  )  # Mean 3.5, deviation 2.29.
  spike = lambda loss, norm: bool(is_spike(history, jnp.float32(loss), jnp.float32(norm), 2.0))
  assert [spike(8.0, 8.0), spike(8.1, 0.0), spike(0.0, 8.1)] == [False, True, True]


def test_nothing_is_a_spike_before_the_window_has_been_filled():
  history = SpikeHistory(jnp.zeros(8), jnp.zeros(8), jnp.int32(7))
  assert not is_spike(history, jnp.float32(1e9), jnp.float32(1e9), 2.0)
