"""Steps out of line: a loss or gradient norm far above those of the last steps that were taken. Off by default.

The history is part of the optimizer's state, so that a run that goes on judges as one that was never interrupted. Only what was
accepted enters it: the steps that are left out are left out of the mean and the deviation too, and a NaN can not live there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class SpikeHistory(NamedTuple):
  """Of the last steps that were taken, as a ring."""

  losses: jax.Array  # float32 [window].
  norms: jax.Array  # float32 [window], of the gradients.
  taken: jax.Array  # int32: steps taken since the start.


class SpikeGuardState(NamedTuple):
  """An optimizer's state beside a history."""

  inner: optax.OptState
  history: SpikeHistory


def guard_spikes(
  tx: optax.GradientTransformation, window: int
) -> optax.GradientTransformationExtraArgs:
  """`tx`, which notes the `loss` and `grad_norm` that its updates come with."""
  inner = optax.with_extra_args_support(tx)

  def init(params):
    empty = jnp.zeros(window, jnp.float32)
    return SpikeGuardState(inner.init(params), SpikeHistory(empty, empty, jnp.int32(0)))

  def update(updates, state, params=None, *, loss, grad_norm, **others):
    losses, norms, taken = state.history
    history = SpikeHistory(
      losses.at[taken % window].set(loss), norms.at[taken % window].set(grad_norm), taken + 1
    )
    updates, after = inner.update(
      updates, state.inner, params, loss=loss, grad_norm=grad_norm, **others
    )
    return updates, SpikeGuardState(after, history)

  return optax.GradientTransformationExtraArgs(init, update)


def is_spike(
  history: SpikeHistory, loss: jax.Array, norm: jax.Array, deviations: float
) -> jax.Array:
  """Whether either lies more than so many standard deviations above its mean. Never, before the window has been filled once."""
  above = lambda value, past: value > past.mean() + deviations * past.std()
  full = history.taken >= history.losses.size
  return full & (above(loss, history.losses) | above(norm, history.norms))
