"""Detection of steps whose loss or gradient norm is far above that of recent steps.

The history of losses and norms is part of the optimizer state, so a resumed run decides as an
uninterrupted one. Only applied steps enter the history. A skipped step therefore changes neither
mean nor deviation, and a NaN cannot enter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class SpikeHistory(NamedTuple):
  """Ring buffer of the last applied steps. Field names are part of checkpoint paths."""

  losses: jax.Array  # float32 [window].
  norms: jax.Array  # float32 [window], global norms of the gradients.
  taken: jax.Array  # int32, number of steps applied since the start.


class SpikeGuardState(NamedTuple):
  """State of an optimizer and the history. Field names are part of checkpoint paths."""

  inner: optax.OptState
  history: SpikeHistory


def guard_spikes(
  tx: optax.GradientTransformation, window: int
) -> optax.GradientTransformationExtraArgs:
  """Wrap `tx` so that each update records its `loss` and `grad_norm`.

  The history holds `window` steps. The wrapper skips nothing by itself: its caller decides with
  `is_spike`, and keeps the old state to skip a step.
  """
  inner = optax.with_extra_args_support(tx)

  def init(params):
    empty = jnp.zeros(window, jnp.float32)
    return SpikeGuardState(inner.init(params), SpikeHistory(empty, empty, jnp.int32(0)))

  def update(updates, state, params=None, *, loss, grad_norm, **extra_args):
    losses, norms, taken = state.history
    slot = taken % window
    history = SpikeHistory(losses.at[slot].set(loss), norms.at[slot].set(grad_norm), taken + 1)
    extra_args |= {'loss': loss, 'grad_norm': grad_norm}
    updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
    return updates, SpikeGuardState(inner_state, history)

  return optax.GradientTransformationExtraArgs(init, update)


def is_spike(
  history: SpikeHistory, loss: jax.Array, norm: jax.Array, deviations: float
) -> jax.Array:
  """Return whether the loss or the norm is a spike, as a boolean scalar.

  A spike is more than `deviations` standard deviations above the mean of the history. Nothing is a
  spike until the history is full.
  """
  is_above = lambda value, past: value > past.mean() + deviations * past.std()
  is_full = history.taken >= history.losses.size
  return is_full & (is_above(loss, history.losses) | is_above(norm, history.norms))
