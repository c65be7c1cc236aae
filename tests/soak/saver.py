"""Kill processes that only save checkpoints, and check the checkpoints.

The saved state is a function of the step, so that the next process can check it.

    python tests/soak/saver.py DIRECTORY ROUNDS SEED [MIB]

starts and kills ROUNDS such processes in sequence, each at a random time, and prints the results as
JSON. They are forked from a process that has imported everything and computed nothing, so that a
round takes one second instead of ten.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.io import verify_checkpoint
from vit_jax.checkpoint.manager import CheckpointManager, list_saved_steps
from vit_jax.step import TrainState

ROUND_TIMEOUT = 300  # Seconds. A process that makes no progress for longer is an error.


def make_state(step: int, mib: float = 0.1) -> TrainState:
  """Return the state after `step`: random numbers of several types, about `mib` MiB."""
  rng = np.random.default_rng(step)
  wide = lambda: jnp.asarray(rng.normal(size=(2, 128, int(mib * 1024))).astype(np.float32))
  params = {'head': {'kernel': wide(), 'bias': jnp.asarray(rng.normal(size=33), jnp.bfloat16)}}
  optimizer = (
    {'momentum': jnp.asarray(rng.normal(size=(7, 9)).astype(np.float32))},
    None,
    jnp.int32(rng.integers(1000)),
  )
  return TrainState(step=jnp.int32(step), params=params, opt_state=optimizer, ema=None)


def state_shapes(mib: float = 0.1) -> TrainState:
  """Return the shapes and shardings of `make_state`."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0, mib)
  )


def states_equal(state: TrainState, other: TrainState) -> bool:
  """Return True if two states are equal bit for bit."""
  pairs = zip(
    jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(jax.device_get(other)), strict=True
  )
  return all(
    a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
  )


def save_forever(workdir: Path, log: int, mib: float):
  """Restore the newest checkpoint, then save step after step until the process is killed.

  A line in the file descriptor `log` records each restore and each commit.
  """
  checkpoints = CheckpointManager(workdir, max_to_keep=2, keep_every=10)
  restored = checkpoints.restore(state_shapes(mib))
  step = int(restored[0].step) if restored else 0
  exact = states_equal(restored[0], make_state(step, mib)) if restored else True
  os.write(log, f'restored {step} {exact}\n'.encode())
  while True:
    step += 1
    checkpoints.save(make_state(step, mib), step)
    checkpoints.check_for_errors()
    os.write(
      log, f'committed {max(list_saved_steps(workdir / "checkpoints"), default=0)}\n'.encode()
    )


def run_and_kill(workdir: Path, log: Path, rng: random.Random, mib: float) -> str:
  """Start a process, kill it, and return its log.

  One process of four is killed while it starts, the others after a few saves.
  """
  log.write_text('', encoding='utf-8')
  child = os.fork()
  if not child:
    try:
      save_forever(workdir, os.open(log, os.O_WRONLY | os.O_APPEND), mib)
    except BaseException:
      traceback.print_exc()
    os._exit(1)
  lines, end = rng.choice((0, 1, 3, 6)), time.monotonic() + ROUND_TIMEOUT
  while log.read_text(encoding='utf-8').count('\n') < lines and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 0.4 if lines else 2))
  os.kill(child, signal.SIGKILL)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  assert code == -signal.SIGKILL, f'the process was not killed: exit code {code}'
  assert time.monotonic() < end, 'the process made no progress'
  return log.read_text(encoding='utf-8')


def run_kill_rounds(directory: Path, rounds: int, seed: int, mib: float) -> dict:
  """Return counts of `rounds` kills, and how often a kill interrupted a save or a deletion."""
  rng, workdir, log = random.Random(seed), directory / 'run', directory / 'log'
  found = {
    'rounds': rounds,
    'lost': 0,
    'wrong': 0,
    'starting': 0,
    'saving': 0,
    'deleting': 0,
    'idle': 0,
  }
  newest = 0
  for _ in range(rounds):
    lines = [line.split() for line in run_and_kill(workdir, log, rng, mib).splitlines()]
    restored = [line for line in lines if line[0] == 'restored']
    found['lost'] += any(int(line[1]) < newest for line in restored)
    found['wrong'] += any(line[2] != 'True' for line in restored)
    newest = max([newest, *(int(line[1]) for line in lines)])
    left = [path.suffix for path in (workdir / 'checkpoints').iterdir()] if workdir.is_dir() else []
    state = (
      'deleting' if '.deleted' in left else 'saving' if '.orbax-checkpoint-tmp' in left else 'idle'
    )
    found[state if restored else 'starting'] += 1
  place = workdir / 'checkpoints'
  return found | {
    'saved': newest,
    'verified': [verify_checkpoint(place / str(step)) for step in sorted(list_saved_steps(place))],
  }


def main(directory: str, rounds: str, seed: str, mib: str = '0.5'):
  print(json.dumps(run_kill_rounds(Path(directory), int(rounds), int(seed), float(mib))))


if __name__ == '__main__':
  main(*sys.argv[1:])
