"""Inject random faults into a run on one or two hosts until the run is complete.

    python tests/soak/chaos.py --seed 1 --minutes 30 [--workdir DIR] [--faults kill,stop] [--steps 600]

The seed determines the faults and the number of steps before each. The same seed repeats them as
closely as the speed of the machine permits. After each round, the logged steps must equal those of
an uninterrupted run. At the end, the state must be equal too. Prints one line for each round, and
at the end the ratio of the run's steps to the steps that were computed. Exits with 1 if anything
differs.
"""

import argparse
import collections
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault('XLA_FLAGS', '')

from tests.runs import Run, account, finished
from vit_jax.checkpoint.manager import list_saved_steps as saved

HEARTBEAT = 10  # Seconds.
FLAGS = ('--config.save_every=5', '--config.eval_every=40', f'--hosts_heartbeat={HEARTBEAT}')
ALLOWED_EXIT_CODES = {
  0,
  75,
  130,
  134,
  137,
  143,
}  # Exit codes that the faults below can cause. All others are failures.


def kill(run: Run, rng: random.Random):
  """Kill one host. The other hosts then end by themselves."""
  run.send(signal.SIGKILL, rng.randrange(len(run.processes)))


def kill_all(run: Run, rng: random.Random):
  """Kill all hosts at once, like a power failure."""
  for host in range(len(run.processes)):
    run.send(signal.SIGKILL, host)


def terminate(run: Run, rng: random.Random):
  """Send SIGTERM to one host, like a preemption."""
  run.send(signal.SIGTERM, rng.randrange(len(run.processes)))


def terminate_group(run: Run, rng: random.Random):
  """Send SIGTERM twice to the process group of every host."""
  for _ in range(2):
    for host in range(len(run.processes)):
      run.send(signal.SIGTERM, host, group=True)
    time.sleep(rng.random() / 2)


def interrupt(run: Run, rng: random.Random):
  """Press Ctrl-C on every host, once or twice."""
  for _ in range(rng.choice([1, 2])):
    for host in range(len(run.processes)):
      run.send(signal.SIGINT, host)
    time.sleep(rng.random() / 2)


def suspend(run: Run, rng: random.Random):
  """Suspend one host for less than the heartbeat timeout, resume it, and kill all hosts later."""
  host = rng.randrange(len(run.processes))
  run.send(signal.SIGSTOP, host)
  time.sleep(rng.uniform(0.1, HEARTBEAT / 3))
  run.send(signal.SIGCONT, host)
  time.sleep(rng.uniform(0.1, 2))
  kill_all(run, rng)


def freeze(run: Run, rng: random.Random):
  """Suspend one host until the other hosts have ended, then kill it."""
  host = rng.randrange(len(run.processes))
  run.send(signal.SIGSTOP, host)
  for other in range(len(run.processes)):
    if other != host:
      run.processes[other].wait(timeout=300)
  run.send(signal.SIGKILL, host)


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
  each.__name__: each
  for each in (kill, kill_all, terminate, terminate_group, interrupt, suspend, freeze)
}


def damage_newest_checkpoint(workdir: Path, rng: random.Random) -> str:
  """Flip a bit of a file of the newest checkpoint, or truncate the file, in 30 % of the calls.

  Return a description of the damage, or an empty string. An only checkpoint is not damaged.
  """
  steps = sorted(saved(workdir / 'checkpoints'))
  if len(steps) < 2 or rng.random() > 0.3:
    return ''
  newest = workdir / 'checkpoints' / str(steps[-1])
  path = rng.choice(
    sorted(path for path in newest.rglob('*') if path.is_file() and path.stat().st_size)
  )
  data = bytearray(path.read_bytes())
  if rng.random() < 0.5:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  else:
    del data[rng.randrange(len(data)) :]
  path.write_bytes(data)
  return f', then {path.relative_to(workdir)} damaged'


def play_round(
  workdir: Path, flags: tuple[str, ...], fault: str, rng: random.Random, number: int, *, hosts: int
) -> tuple[list[int], int, str]:
  """Run until one fault ends the run. Return (exit codes, number of steps, a description)."""
  flags += (f'--config.data.workers={rng.choice([0, 0, 1])}',)
  with Run(workdir, *flags, hosts=hosts, devices=2 // hosts, start=number) as run:
    ahead, early = rng.randint(1, 60), rng.random() < 0.25
    deadline = time.monotonic() + (rng.uniform(0, 20) if early else 600)
    done = lambda: parse_logged_steps(run.text())
    while time.monotonic() < deadline and len(done()) < ahead and run.processes[0].poll() is None:
      time.sleep(0.01)
    where = f'at step {done()[-1]}' if done() else 'before the first step'
    FAULTS[fault](run, rng)
    codes, taken = run.codes(), len(done())
    text = '\n'.join(run.text(host)[-2000:] for host in range(hosts))
  assert set(codes) <= ALLOWED_EXIT_CODES, f'exit codes {codes}\n{text}'
  return codes, taken, f'{hosts} hosts, {fault} {where}'


def parse_logged_steps(text: str) -> list[int]:
  """Return the steps that a host has printed."""
  return [int(step) for step in re.findall(r'^step (\d+)/\d+  loss', text, re.MULTILINE)]


def run_chaos(
  workdir: Path,
  *,
  seed: int,
  minutes: float,
  rounds: int,
  faults: list[str],
  steps: int,
  hosts: tuple[int, ...] = (1, 2),
  damaging: bool = True,
) -> dict:
  """Play rounds until the time, the number of rounds or the run ends, and return statistics.

  Raises AssertionError if a step or the last state differs from an uninterrupted run.
  """
  rng = random.Random(seed)
  flags = (*FLAGS, f'--config.steps={steps}')
  uninterrupted = workdir / 'uninterrupted'
  finished(uninterrupted, *flags)
  expected = account(uninterrupted)
  run, taken, number, seen, end = (
    workdir / 'run',
    0,
    0,
    collections.Counter(),
    time.monotonic() + 60 * minutes,
  )
  while (
    time.monotonic() < end
    and number < rounds
    and max(saved(run / 'checkpoints'), default=0) < steps
  ):
    fault = rng.choice(faults)
    codes, more, what = play_round(run, flags, fault, rng, number, hosts=rng.choice(hosts))
    taken, number = taken + more, number + 1
    seen[fault] += 1
    assert_logged_steps_equal(run, expected)
    harm = damage_newest_checkpoint(run, rng) if damaging else ''
    seen['damage'] += bool(harm)
    print(
      f'{number}: {what}: exit codes {codes}, saved {sorted(saved(run / "checkpoints"))}{harm}',
      flush=True,
    )
  before = max(saved(run / 'checkpoints'), default=0)
  finished(run, *flags)
  taken += len(parse_logged_steps((run.with_name('run-99-host0.log')).read_text(encoding='utf-8')))
  assert account(run) == expected, 'the end differs'
  return {
    'rounds': number,
    'faults': dict(seen),
    'steps': steps,
    'taken': taken,
    'goodput': steps / taken,
    'before': before,
  }


def assert_logged_steps_equal(run: Path, expected: dict):
  """Raise AssertionError if a logged step differs from the uninterrupted run."""
  if not (run / 'ids.jsonl').exists():
    return
  text = (run / 'ids.jsonl').read_text(encoding='utf-8')
  logged = text[: text.rfind('\n') + 1].splitlines()
  assert logged == expected['ids'][: len(logged)], 'a step differs'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  option = parser.add_argument
  option('--seed', type=int, default=0)
  option('--minutes', type=float, default=30)
  option('--rounds', type=int, default=10**6)
  option('--steps', type=int, default=600)
  option('--faults', default=','.join(FAULTS))
  option('--workdir', type=Path, default=Path('/tmp/chaos'))
  args = parser.parse_args()
  shutil.rmtree(args.workdir, ignore_errors=True)
  args.workdir.mkdir(parents=True)
  settings = {
    'seed': args.seed,
    'minutes': args.minutes,
    'rounds': args.rounds,
    'steps': args.steps,
  }
  print(run_chaos(args.workdir, faults=args.faults.split(','), **settings), flush=True)


if __name__ == '__main__':
  main()
