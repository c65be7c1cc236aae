"""Measure the time of a run's first steps, before the length of the run is decided."""

import time

import jax
import numpy as np

from vit_jax.training.program import abstract_state, compile_train_step, make_init_fn
from vit_jax.training.setup import Run

_STEPS = 5  # The first is slower, and is not counted.


def measure_step_time(run: Run) -> tuple[float, float]:
  """Return (seconds of a step with its data, seconds until the first step). Nothing is written."""
  began, seed = time.monotonic(), run.config.seed
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run.program))
  state = jax.jit(make_init_fn(run.program), out_shardings=shardings)(seed)
  train_step, batches = compile_train_step(run.program), run.batches(start=0)
  times = [time.monotonic()]
  for _ in range(_STEPS):
    _, batch = next(batches)
    state, metrics = train_step(state, batch, **run.constants)
    jax.block_until_ready(metrics)
    times.append(time.monotonic())
  return min(np.diff(times[1:])), times[0] - began
