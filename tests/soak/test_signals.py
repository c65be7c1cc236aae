"""SIGTERM in twelve situations and Ctrl-C in two, five times each, with growing delays.

The run then ends with the results of an uninterrupted run.
"""

import contextlib
import dataclasses
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.runs import Run, account, finished, stopped_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

# The run is long, so that it does not end before a signal on a busy machine. GRACE is the number of
# seconds between SIGTERM and SIGKILL on platforms.
STEPS, DELAYS, GRACE = 1200, 5, 30
FLAGS = (f'--config.steps={STEPS}', '--config.eval_every=200')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
  """When a run of which shape receives which signals, and the permitted exit codes, `codes`."""

  until: str  # Pattern of the output to wait for. {next} is a future step.
  spread: float  # Seconds over which the delays after that output are spread.
  flags: tuple[str, ...] = ()
  hosts: int = 1
  signalled: tuple[int, ...] = (0,)  # Hosts that receive the signals.
  signals: tuple[int, ...] = (signal.SIGTERM,)
  group: bool = False
  codes: tuple[int, ...] = (75,)
  late: bool = False  # Near the end of the run. Each attempt starts from the same checkpoint.


SIGNAL_SCENARIOS = {
  # 143: SIGTERM before our handlers are installed.
  'starting Python and JAX': Scenario(until='', spread=6, codes=(75, 143)),
  'first compilation': Scenario(
    until=r'steps \d+ to', spread=1, flags=('--config.model.width=48',)
  ),
  'restoring': Scenario(until='', spread=0),
  'training': Scenario(until='step {next}/', spread=0.2),
  'evaluating': Scenario(
    until=r'step {next}/\d+  loss', spread=0.3, flags=('--config.eval_every=4',)
  ),
  'committing': Scenario(
    until='step {next}/', spread=0.05, flags=('--config.save_every=1', '--config.max_to_keep=10')
  ),
  'the last steps': Scenario(until=f'step {STEPS - 2}/', spread=0.3, codes=(0, 75), late=True),
  'after the last step': Scenario(
    until=f'step {STEPS}/.*accuracy', spread=0.5, codes=(0, 75), late=True
  ),
  'training, the group, with workers': Scenario(
    until='step {next}/',
    spread=0.2,
    flags=('--config.data.workers=2', '--config.eval_every=5'),
    group=True,
  ),
  'training, twice': Scenario(
    until='step {next}/', spread=0.2, signals=(signal.SIGTERM, signal.SIGTERM)
  ),
  'training, one of two hosts': Scenario(
    until='step {next}/', spread=0.2, hosts=2, signalled=(1,), codes=(75,)
  ),
  'evaluating, all of two hosts': Scenario(
    until=r'step {next}/\d+  loss',
    spread=0.3,
    flags=('--config.eval_every=4',),
    hosts=2,
    signalled=(0, 1),
    group=True,
  ),
}
INTERRUPT_SCENARIOS = {
  'Ctrl-C': Scenario(until='step {next}/', spread=0.2, signals=(signal.SIGINT,), codes=(130,)),
  'Ctrl-C twice': Scenario(
    until='step {next}/', spread=0.2, signals=(signal.SIGINT, signal.SIGINT), codes=(130,)
  ),
}


@pytest.fixture(scope='module')
def uninterrupted_run(tmp_path_factory) -> Path:
  """Return the directory of an uninterrupted run, with all its checkpoints."""
  workdir = tmp_path_factory.mktemp('runs') / 'uninterrupted'
  finished(workdir, *FLAGS, '--config.max_to_keep=12')
  return workdir


@pytest.mark.parametrize('name', [*SIGNAL_SCENARIOS, *INTERRUPT_SCENARIOS])
def test_a_signalled_run_saves_and_exits_within_the_grace_period(uninterrupted_run, tmp_path, name):
  situation, workdir = (SIGNAL_SCENARIOS | INTERRUPT_SCENARIOS)[name], tmp_path / 'run'
  other = '--config.model.width=48' in situation.flags
  step, slowest = 0, 0.0
  if name == 'restoring' or situation.late:
    copy_run_at_step(uninterrupted_run, workdir, step := STEPS - 20)
  for i in range(DELAYS):
    with Run(
      workdir,
      *FLAGS,
      *situation.flags,
      hosts=situation.hosts,
      devices=2 // situation.hosts,
      start=i,
    ) as run:
      if name == 'restoring':
        wait_until_locked(workdir, run, i)
      elif situation.until:
        run.until(situation.until.replace('{next}', str(next_step(step, situation))))
      time.sleep((i if situation.until else i + 1) * situation.spread / DELAYS)
      began = time.monotonic()
      for number in situation.signals:
        for host in situation.signalled:
          run.send(number, host, group=situation.group)
        time.sleep(0.05)
      codes = run.codes()
      slowest = max(slowest, time.monotonic() - began)
      assert set(codes) <= set(situation.codes), (codes, run.text()[-3000:])
      if situation.late:
        finished(workdir, *FLAGS)
        assert account(workdir) == account(uninterrupted_run)
        shutil.rmtree(workdir)
        copy_run_at_step(uninterrupted_run, workdir, step)
      elif 'stopped and saved' in run.text():
        step = stopped_at(run.text())
  print(f'{name}: {DELAYS} of {DELAYS}, the slowest {slowest:.1f} s')
  assert slowest < GRACE
  if not other:
    finished(workdir, *FLAGS)
    assert {**account(workdir), 'evaluations': []} == {
      **account(uninterrupted_run),
      'evaluations': [],
    }
    mine = {tuple(record.items()) for record in account(workdir)['evaluations']}
    assert {tuple(record.items()) for record in account(uninterrupted_run)['evaluations']} <= mine


def next_step(step: int, situation: Scenario) -> int:
  """Return a step soon after `step` at which the situation occurs."""
  every = 4 if '--config.eval_every=4' in situation.flags else 1
  return (step + 4) // every * every + every


def wait_until_locked(workdir: Path, run: Run, i: int):
  """Wait until a run has locked its directory, just before it restores, and then 0.1 * `i` s.

  Earlier runs, which were killed, have left the file.
  """
  mine = f'"pid": {run.processes[0].pid},'
  while mine not in read_if_exists(workdir / 'trainer.json') and run.processes[0].poll() is None:
    time.sleep(0.005)
  time.sleep(0.1 * i)


def read_if_exists(path: Path) -> str:
  """Return the text of a file, or an empty string if it does not exist."""
  return path.read_text(encoding='utf-8') if path.exists() else ''


def copy_run_at_step(uninterrupted_run: Path, workdir: Path, step: int):
  """Copy a run without its checkpoints after `step`."""
  later = [str(saved) for saved in range(step + 1, STEPS + 1)]
  shutil.copytree(
    uninterrupted_run, workdir, ignore=shutil.ignore_patterns(*later, 'trainer.json', '.lock')
  )
  with contextlib.suppress(FileNotFoundError):
    (workdir / 'curves.png').unlink()
