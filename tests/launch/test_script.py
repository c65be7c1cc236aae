"""The start-up script of a TPU VM, run.

Its folders lie under another, and the machine's commands are stand-ins.
"""

import os
import shlex
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from vit_jax.launch.job import Job
from vit_jax.launch.script import machine_script

JOB = Job(
  name='b16', backend='tpu-vm', tpu='v6e-8', slices=1, spot=True, project='', zone='us-west4-a', cluster='',
  workdir='gs://runs/b16', data='gs://sets/all', env={'LIBTPU_INIT_ARGS': '--a=1 --b=2'}, python='3.11', commit='abc',
  command=('run_pretrain.py', '--config=configs/pretrain.py:B/16,imagenet21k', '--workdir=/mnt/workdir'),
)  # fmt: skip
# Notes that it was called, and does what is left of its work; gcsfuse fails where it would hold the
# lock for ever.
STAND_IN = r"""#!/bin/bash
name=${0##*/} last=${*: -1}
mounted=$MACHINE/mounted${last//\//_}
echo "$name $*" >> "$MACHINE/calls"
case "$name $*" in
  mountpoint*) test -e "$mounted" ;;
  gcsfuse*) touch "$mounted"; ! { : >&9; } 2> /dev/null ;;
  apt-get*install*) cp "$0" "$MACHINE/bin/gcsfuse" ;;
  python3*venv*) mkdir -p "$last/bin"; cp "$MACHINE/python" "$last/bin/python" ;;
esac
"""
# Notes what it is to run, and ends as the file `codes` says: a line each time.
PYTHON = r"""#!/bin/bash
echo "$PWD: $*: $LIBTPU_INIT_ARGS: $TFDS_DATA_DIR" >> "$MACHINE/runs"
read -r code < "$MACHINE/codes"
sed -i 1d "$MACHINE/codes"
case $code in
  stop) touch "$MACHINE/run/vit_jax/stop"; exit 75 ;;
  long) trap 'exit 75' TERM; sleep 60 & wait $! ;;
esac
exit "$code"
"""


class Machine:
  """A TPU VM that is none."""

  def __init__(self, place: Path):
    self.place = place
    self.environment = os.environ | {
      'MACHINE': str(place),
      'PATH': f'{place / "bin"}:/usr/bin:/bin',
      'HOSTNAME': 'host-0',
    }
    for folder in (
      'bin',
      'run',
      'var/log',
      'etc/apt/sources.list.d',
      'sys/kernel/mm/transparent_hugepage',
      'opt',
    ):
      (place / folder).mkdir(parents=True)
    for name in ('mountpoint', 'curl', 'apt-get', 'lsb_release', 'python3'):
      self.program(place / 'bin' / name, STAND_IN)
    self.program(place / 'python', PYTHON)
    self.launch = place / 'mnt/workdir/launch/b16'
    self.launch.mkdir(parents=True)
    (place / 'pyproject.toml').write_text('')
    with tarfile.open(self.launch / 'code.tar.gz', 'w:gz') as code:
      code.add(place / 'pyproject.toml', 'pyproject.toml')
    script = machine_script(JOB)
    for folder in ('/run/', '/mnt/', '/var/', '/sys/', '/etc/', '/opt/'):
      script = script.replace(f' {folder}', f' {place}{folder}').replace(
        f'={folder}', f'={place}{folder}'
      )
    (place / 'start.sh').write_text(script)

  def program(self, path: Path, text: str):
    path.write_text(text, encoding='utf-8')
    path.chmod(0o755)

  def boot(self, *codes) -> subprocess.Popen:
    """Runs the script; the command ends with these codes, one after another."""
    (self.place / 'codes').write_text(''.join(f'{code}\n' for code in codes))
    return subprocess.Popen(
      ['bash', self.place / 'start.sh'], env=self.environment, start_new_session=True
    )

  def lines(self, name: str) -> list[str]:
    path = self.place / name
    return path.read_text().splitlines() if path.exists() else []

  def exit_code(self) -> str | None:
    """What it left for the babysitter."""
    path = self.launch / 'exit/host-0'
    return path.read_text().strip() if path.exists() else None

  def wait_for_run(self):
    """Until the command runs, 20 s at most."""
    until = time.monotonic() + 20
    while not self.lines('runs') and time.monotonic() < until:
      time.sleep(0.02)
    assert self.lines('runs'), self.lines('var/log/vit_jax.log')


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


ENDS = {
  'it is done': ([0], 0, 1),
  'it asks to be started again, twice': ([75, 75, 0], 0, 3),
  'it fails': ([75, 3, 0], 3, 2),
  'it is stopped': (['stop', 0], 75, 1),
}


@pytest.mark.parametrize('case', ENDS)
def test_a_command_that_ends_with_75_is_started_again_and_any_other_code_is_left_for_the_babysitter(
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


def test_a_second_boot_mounts_and_runs_and_installs_nothing_again(machine):
  assert machine.boot(3).wait(60) == 3
  first = [line.split()[0] for line in machine.lines('calls')]
  assert [first.count(name) for name in ('gcsfuse', 'curl', 'python3')] == [2, 1, 3]
  for mounted in machine.place.glob('mounted*'):
    mounted.unlink()
  assert machine.boot(0).wait(60) == 0
  second = [line.split()[0] for line in machine.lines('calls')[len(first) :]]
  assert second == ['mountpoint', 'gcsfuse'] * 2
  assert machine.exit_code() == '0'


def test_a_machine_that_is_taken_away_leaves_no_exit_code(machine):
  script = machine.boot('long')
  machine.wait_for_run()
  script.terminate()
  assert script.wait(20) == 143
  assert machine.exit_code() is None
  os.killpg(script.pid, signal.SIGTERM)  # As the machine ends what is left.


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
    int((machine.place / 'run/vit_jax/pid').read_text()), signal.SIGTERM
  )  # As `launch stop` does.
  assert script.wait(20) == 75
  assert machine.exit_code() == '75'
