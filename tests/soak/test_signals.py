"""SIGTERM in twelve situations, five times each, a little later each time.

The run ends as one that nothing interrupted.
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

# A busy machine must not end a run before a signal is sent. GRACE: seconds that platforms give.
STEPS, DELAYS, GRACE = 1200, 5, 30
FLAGS = (f'--config.steps={STEPS}', '--config.eval_every=200')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
  """When, in what shape and how a run is told; `codes` are what it may end with."""

  until: str  # What is said before; {next}: a step that the run will come to.
  spread: float  # Seconds over which the moments lie after that.
  flags: tuple[str, ...] = ()
  hosts: int = 1
  told: tuple[int, ...] = (0,)  # Hosts.
  signals: tuple[int, ...] = (signal.SIGTERM,)
  group: bool = False
  codes: tuple[int, ...] = (75,)
  late: bool = False  # At the run's end, each time anew.


SIGNAL_SCENARIOS = {
  'starting Python and JAX': Scenario(
    until='', spread=6, codes=(75, 143)
  ),  # 143: before Python has come to us.
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
  'having done': Scenario(until=f'step {STEPS}/.*accuracy', spread=0.5, codes=(0, 75), late=True),
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
    until='step {next}/', spread=0.2, hosts=2, told=(1,), codes=(75,)
  ),
  'evaluating, all of two hosts': Scenario(
    until=r'step {next}/\d+  loss',
    spread=0.3,
    flags=('--config.eval_every=4',),
    hosts=2,
    told=(0, 1),
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
  """A run that nothing interrupted, with all its checkpoints."""
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
        for host in situation.told:
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
  """A step, soon after `step`, at which the situation arises."""
  every = 4 if '--config.eval_every=4' in situation.flags else 1
  return (step + 4) // every * every + every


def wait_until_locked(workdir: Path, run: Run, i: int):
  """Waits until a run has taken its directory, which it does just before it restores.

  And a little more each time.
  """
  mine = f'"pid": {run.processes[0].pid},'  # One that was killed before has left the file.
  while mine not in read_if_exists(workdir / 'trainer.json') and run.processes[0].poll() is None:
    time.sleep(0.005)
  time.sleep(0.1 * i)


def read_if_exists(path: Path) -> str:
  """The text of a file, which may not be there."""
  return path.read_text(encoding='utf-8') if path.exists() else ''


def copy_run_at_step(uninterrupted_run: Path, workdir: Path, step: int):
  """A copy of a run as it was after `step`."""
  later = [str(saved) for saved in range(step + 1, STEPS + 1)]
  shutil.copytree(
    uninterrupted_run, workdir, ignore=shutil.ignore_patterns(*later, 'trainer.json', '.lock')
  )
  with contextlib.suppress(FileNotFoundError):
    (workdir / 'curves.png').unlink()
