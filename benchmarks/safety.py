"""Measure the cost of safety features: the training loop with and without them.

The features are the check for finite values, the log of examples, the watchdog and preemption.

    python benchmarks/safety.py [--rounds 30] [--steps 5] [SHAPE …]

Both sides train on one batch that is already on the device. They alternate, a few steps each, in
one process, so that other load on the machine affects both. Their order changes from round to
round. The ratios are those of medians, of wall seconds and of the CPU seconds of the process; the
latter depend less on other programs. A ratio of 1 means no cost.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Config, ModelConfig, OptimConfig
from vit_jax.metrics.step_log import StepLog
from vit_jax.metrics.writer import MetricsWriter
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.step import abstract_params, init_state, train_step

SHAPES = {
  'quickstart': (
    ModelConfig(variant='Ti/7', width=128, depth=4, mlp=256, heads=4, pool='gap', unroll=0),
    (28, 28),
    96,
  ),
  'Ti/16': (ModelConfig(variant='Ti/16', unroll=0), (224, 224), 8),
}
LOG_EVERY = 50
UNGUARDED = {
  'not_finite': jnp.bool_(False),
  'spikes': jnp.bool_(False),
}  # Constants: the compiler takes the gate out.


def clocks() -> np.ndarray:
  """Return wall seconds and CPU seconds of this process."""
  return np.array([time.perf_counter(), time.process_time()])


def compiled(name: str, *, guarded: bool):
  """Return a state, a step compiled with or without the check for finite values, and a batch."""
  config, size, b = SHAPES[name]
  model, lr = build_vit(config, 10), lambda step: 1e-3
  tx = make_optimizer(
    OptimConfig(weight_decay=0.1, grad_clip_norm=1.0), lr, abstract_params(model, size)
  )
  state = jax.jit(functools.partial(init_state, 0, model=model, tx=tx, size=size, ema=False))()
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (b, *size, 3), dtype=np.uint8),
    'label': rng.integers(0, 10, (b, 1)).astype(np.int32),
  }
  batch = jax.device_put(batch | {'mask': np.ones(b, bool)})
  step = functools.partial(train_step, model=model, tx=tx, loss=softmax_loss, lr=lr, seed=0)
  with (
    contextlib.nullcontext()
    if guarded
    else mock.patch('vit_jax.step.skip_reasons', lambda *_: UNGUARDED)
  ):
    return state, jax.jit(step, donate_argnums=0).lower(state, batch).compile(), batch


def unsafe(name: str):
  """Return a function that takes steps without the features, and returns the time of each clock."""
  state, step, batch = compiled(name, guarded=False)
  pending, done = [], 0

  def run(steps: int) -> np.ndarray:
    nonlocal state, pending, done
    began = clocks()
    for _ in range(steps):
      state, values = step(state, batch)
      pending.append(values)
      done += 1
      if done % LOG_EVERY == 0:
        pending = jax.device_get(pending)[:0]
    jax.block_until_ready(state)
    return clocks() - began

  return run


def safe(name: str, workdir: Path):
  """Return the same function with all features."""
  state, step, batch = compiled(name, guarded=True)
  metrics = MetricsWriter(workdir, step=0, steps=10**6)
  log = StepLog(
    metrics,
    throughput=lambda seconds: {'images_per_second': 0.0, 'seconds_per_step': seconds},
    ids_path=workdir / 'ids.jsonl',
    max_bad_steps=10,
    max_bad_images=lambda step: 0,
    describe_bad_example=lambda i: '',
    step=0,
    counters={},
  )
  ids, done, watchdog = np.arange(len(batch['mask'])), 0, Watchdog()
  watchdog.start(single_process=True)
  watchdog.set_timeouts(step=600, slow=1800)
  preemption = Preemption()

  def run(steps: int) -> np.ndarray:
    nonlocal state, done
    began = clocks()
    for _ in range(steps):
      state, values = step(state, batch)
      done += 1
      log.append(done, values, ids)
      watchdog.step_done(values)
      preemption.should_stop()
      if done % LOG_EVERY == 0:
        log.write_summary(done)
    jax.block_until_ready(state)
    return clocks() - began

  return run


def main():
  args = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  args.add_argument('--rounds', type=int, default=30)
  args.add_argument('--steps', type=int, default=5, help='in a turn')
  args.add_argument(
    'shapes', nargs='*', default=list(SHAPES), metavar='SHAPE', help=' or '.join(SHAPES)
  )
  args = args.parse_args()
  assert Config().log_every == str(LOG_EVERY)
  for name in args.shapes:
    with tempfile.TemporaryDirectory() as workdir:
      sides = {'safe': safe(name, Path(workdir)), 'unsafe': unsafe(name)}
      seconds = {side: [] for side in sides}
      for side in sides.values():
        side(2)
      for turn in range(args.rounds):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
          seconds[side].append(sides[side](args.steps) / args.steps)
    safe_ms, unsafe_ms = (1000 * np.median(seconds[side], axis=0) for side in sides)
    ratio, cpu_ratio = safe_ms / unsafe_ms
    print(
      f'{name:12} safe {safe_ms[0]:8.2f} ms  unsafe {unsafe_ms[0]:8.2f} ms  ratio {ratio:.3f}  of '
      f'CPU seconds {cpu_ratio:.3f}  '
      f'({jax.devices()[0].device_kind}, jax {jax.__version__})'
    )


if __name__ == '__main__':
  main()
