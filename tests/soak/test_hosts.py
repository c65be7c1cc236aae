"""If a host dies, freezes or hangs, all hosts exit in the promised time and print their stacks.

Kills of one host do not change the result.
"""

import json
import os
import signal
import time

import pytest

from tests.runs import Run, account, finished, lines, stopped_at
from tests.soak.chaos import run_chaos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

HEARTBEAT, STUCK = 10, 20  # Seconds.
FLAGS = ('--config.steps=100000', '--config.data.workers=1', f'--hosts_heartbeat={HEARTBEAT}')
WATCHDOG_FLAGS = (f'--config.step_timeout={STUCK}',)


def wait_until_training(run: Run):
  """Wait until the hosts take steps."""
  run.until('step 5/')


def wait_for_exit(run: Run) -> tuple[list[int], float]:
  """Wait for all hosts, and return (exit codes, seconds of waiting)."""
  began = time.monotonic()
  return run.codes(), time.monotonic() - began


@pytest.mark.parametrize('host', [0, 1])
def test_an_exception_on_one_host_ends_all_and_shows_where_each_was(tmp_path, host):
  """Grain raises an error for a killed worker. The other host learns of it over the network."""
  with Run(tmp_path / 'run', *FLAGS, hosts=2, devices=1) as run:
    wait_until_training(run)
    for worker in run.workers(host):
      os.kill(worker, signal.SIGKILL)
    codes, seconds = wait_for_exit(run)
    print(f'exception on host {host}: {codes} after {seconds:.1f} s')
    assert codes[host] == 1 and codes[1 - host] in (75, 134)
    assert 'Worker process was terminated unexpectedly' in run.text(host)
    assert all('most recent call' in run.text(i) for i in (0, 1))
    assert (tmp_path / 'run' / 'failures' / f'0-1-host{host}.txt').exists()
    assert seconds < 15


@pytest.mark.parametrize('host', [0, 1])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP], ids=['kill', 'freeze'])
def test_a_host_that_is_lost_ends_the_other(tmp_path, host, how):
  with Run(tmp_path / 'run', *FLAGS, hosts=2, devices=1) as run:
    wait_until_training(run)
    run.send(how, host)
    began = time.monotonic()
    code = run.processes[1 - host].wait(timeout=300)
    seconds = time.monotonic() - began
    print(f'{how.name} of host {host}: {code} after {seconds:.1f} s')
    assert code in (75, -signal.SIGABRT)
    assert 'most recent call' in run.text(1 - host)
    assert seconds < HEARTBEAT + 5


@pytest.mark.parametrize('host', [0, 1])
def test_a_stuck_loader_is_found_by_the_watchdog(tmp_path, host):
  with Run(tmp_path / 'run', *FLAGS, *WATCHDOG_FLAGS, hosts=2, devices=1) as run:
    wait_until_training(run)
    for worker in run.workers(host):
      os.kill(worker, signal.SIGSTOP)
    codes, seconds = wait_for_exit(run)
    print(f'stuck loader on host {host}: {codes} after {seconds:.1f} s')
    assert 76 in codes and set(codes) <= {75, 76, 134}
    assert 'no progress for 20 s' in run.text(0) + run.text(1)
    assert list((tmp_path / 'run' / 'failures').iterdir())
    assert seconds < STUCK + 15


def test_a_stuck_start_is_found_by_the_watchdog(tmp_path):
  finished(tmp_path / 'compiled', '--config.data.workers=1')
  with Run(tmp_path / 'run', *FLAGS, '--config.first_step_timeout=30', start=0) as run:
    while not run.workers():
      assert run.processes[0].poll() is None, run.text()[-3000:]
      time.sleep(0.005)
    for worker in run.workers():
      os.kill(worker, signal.SIGSTOP)
    codes, seconds = wait_for_exit(run)
    print(f'stuck start: {codes} after {seconds:.1f} s')
    assert codes == [76]


def test_a_worker_that_dies_is_an_error_at_once_and_leaves_nothing(tmp_path):
  shared = set(os.listdir('/dev/shm'))  # noqa: PTH208 -- only the names are needed.
  with Run(tmp_path / 'run', *FLAGS) as run:
    wait_until_training(run)
    workers = run.workers()
    for worker in workers:
      os.kill(worker, signal.SIGKILL)
    codes, seconds = wait_for_exit(run)
    print(f'worker killed: {codes} after {seconds:.1f} s')
    assert codes == [1] and 'exit code -9' in run.text()
  time.sleep(3)
  assert not [pid for pid in workers if os.path.exists(f'/proc/{pid}')]  # noqa: PTH110
  left = {name for name in set(os.listdir('/dev/shm')) - shared if name.startswith('psm_')}  # noqa: PTH208
  assert not left or disappear_in_20_seconds(left)


def disappear_in_20_seconds(names: set[str]) -> bool:
  """Return True if the files are gone after 20 s: other programs on this machine create some too."""
  time.sleep(20)
  return not {name for name in names if os.path.exists(f'/dev/shm/{name}')}  # noqa: PTH110


def test_a_crash_loop_ends(tmp_path):
  codes = []
  for start in range(4):
    with Run(tmp_path / 'run', *FLAGS, start=start) as run:
      if start < 3:
        wait_until_training(run)
        for worker in run.workers():
          os.kill(worker, signal.SIGKILL)
      codes += run.codes()
  assert codes == [1, 1, 1, 77], run.text()
  assert '3 starts from step 0 ' in run.text()
  assert len(list((tmp_path / 'run' / 'failures').iterdir())) == 3


def test_twenty_kills_of_one_of_two_hosts_change_nothing(tmp_path):
  figures = run_chaos(
    tmp_path, seed=5, minutes=90, rounds=20, faults=['kill'], steps=1000, hosts=(2,), damaging=False
  )
  print(figures)
  assert figures['rounds'] == 20


def test_fsdp_over_eight_devices_resumes_on_two_hosts_of_two_and_of_one(tmp_path):
  """Each host compares its restored arrays with the checksums of the saved arrays.

  If they differed, the run would print that the checkpoint is damaged.
  """
  wide, workdir = ('--config.model.width=256', '--config.model.heads=4'), tmp_path / 'run'
  shapes = ({'hosts': 1, 'devices': 8}, {'hosts': 2, 'devices': 2}, {'hosts': 2, 'devices': 1})
  step = 0
  for i, shape in enumerate(shapes):
    with Run(
      workdir, *wide, f'--config.mesh.fsdp={shape["hosts"] * shape["devices"]}', start=i, **shape
    ) as run:
      if i < 2:
        run.until(f'step {step + 5}/60')
        run.send(signal.SIGTERM, shape['hosts'] - 1)
      assert set(run.codes()) == ({75} if i < 2 else {0}), run.text()[-3000:]
      assert 'damaged' not in run.text() and (not i or f'resumes after step {step}\n' in run.text())
      step = stopped_at(run.text()) if i < 2 else 60
  finished(tmp_path / 'one', *wide, devices=1)
  ids, losses = (
    [line[name] for line in map(json.loads, lines(workdir / 'ids.jsonl'))]
    for name in ('ids', 'loss')
  )
  alone = [json.loads(line) for line in lines(tmp_path / 'one' / 'ids.jsonl')]
  assert ids == [line['ids'] for line in alone]
  assert [float.fromhex(x) for x in losses] == pytest.approx(
    [float.fromhex(line['loss']) for line in alone], rel=1e-3
  )


def test_repeating_a_run_or_splitting_it_over_two_processes_changes_no_bit(tmp_path):
  shapes = {'one': {}, 'again': {}, 'two': {'hosts': 2, 'devices': 1}}
  for name, shape in shapes.items():
    finished(tmp_path / name, **shape)
  assert account(tmp_path / 'one') == account(tmp_path / 'again') == account(tmp_path / 'two')
