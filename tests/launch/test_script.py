"""The start-up script of a TPU VM, run on a simulated machine."""

import os
import shlex
import signal
import subprocess

import pytest

from tests.launch.machine import JOB, Machine


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


ENDS = {
  'it succeeds': ([0], 0, 1),
  'it requests a restart twice': ([75, 75, 0], 0, 3),
  'it fails': ([75, 3, 0], 3, 2),
  'it is stopped': (['stop', 0], 75, 1),
}


@pytest.mark.parametrize('case', ENDS)
def test_a_command_that_exits_with_75_is_restarted_and_other_codes_are_written_for_the_babysitter(
  machine, case
):
  codes, ended, runs = ENDS[case]
  assert machine.boot(*codes).wait(60) == ended, machine.lines('var/log/vit_jax.log')
  assert machine.exit_code() == str(ended)
  command = shlex.join(JOB.command).replace('/mnt', f'{machine.place}/mnt')
  assert (
    machine.lines('runs')
    == [f'{machine.place}/opt/vit_jax/abc: {command}: --a=1 --b=2: {machine.place}/mnt/data'] * runs
  )


def test_a_second_boot_mounts_and_runs_but_installs_nothing(machine):
  assert machine.boot(3).wait(60) == 3
  first = [line.split()[0] for line in machine.lines('calls')]
  assert [first.count(name) for name in ('gcsfuse', 'curl', 'python3')] == [2, 1, 3]
  for mounted in machine.place.glob('mounted*'):
    mounted.unlink()
  assert machine.boot(0).wait(60) == 0
  second = [line.split()[0] for line in machine.lines('calls')[len(first) :]]
  assert second == ['mountpoint', 'gcsfuse'] * 2
  assert machine.exit_code() == '0'


def test_a_preempted_machine_leaves_no_exit_code(machine):
  script = machine.boot('long')
  machine.wait_for_run()
  script.terminate()
  assert script.wait(20) == 143
  assert machine.exit_code() is None
  os.killpg(script.pid, signal.SIGTERM)  # The machine then ends the remaining processes.


def test_a_script_that_is_run_twice_runs_the_command_once(machine):
  script = machine.boot('long')
  machine.wait_for_run()
  second = subprocess.run(
    ['bash', machine.place / 'start.sh'], env=machine.environment, timeout=20, check=False
  )
  assert second.returncode == 0
  assert len(machine.lines('runs')) == 1
  assert machine.exit_code() is None
  (machine.place / 'run/vit_jax/stop').touch()
  os.kill(
    int((machine.place / 'run/vit_jax/pid').read_text(encoding='utf-8')), signal.SIGTERM
  )  # As `launch stop` does.
  assert script.wait(20) == 75
  assert machine.exit_code() == '75'
