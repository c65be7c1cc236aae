"""Stand-ins for a TPU VM and for a container, on which a start script runs.

The root folders of the machine are below a temporary one, and its commands are stand-ins.
"""

import os
import subprocess
import tarfile
import time
from pathlib import Path

import yaml

from vit_jax.launch.bundle import make_start_files
from vit_jax.launch.job import Job
from vit_jax.launch.script import start_script

JOB = Job(
  name='b16', backend='tpu-vm', tpu='v6e-8', slices=1, spot=True, project='', zone='us-west4-a', cluster='',
  workdir='gs://runs/b16', data='gs://sets/all', env={'LIBTPU_INIT_ARGS': '--a=1 --b=2'}, python='3.11', commit='abc',
  command=('run_pretrain.py', '--config=configs/pretrain.py:B/16,imagenet21k', '--workdir=/mnt/workdir'),
)  # fmt: skip
# Records its call and simulates the effect of the command. gcsfuse fails if it inherits the lock of
# the script, which it would hold for ever.
STAND_IN = r"""#!/bin/bash
name=${0##*/} last=${*: -1}
mounted=$MACHINE/mounted${last//\//_}
echo "$name $*" >> "$MACHINE/calls"
printf '%s\0' "$@" > "$MACHINE/$name.argv"
case "$name $*" in
  mountpoint*) test -e "$mounted" ;;
  gcsfuse*) touch "$mounted"; ! { : >&9; } 2> /dev/null ;;
  apt-get*install*) cp "$0" "$MACHINE/bin/gcsfuse" ;;
  python3*venv*) mkdir -p "$last/bin"; cp "$MACHINE/python" "$last/bin/python" ;;
esac
"""
# Records its arguments, argv and environ, and exits as the next line of the file `codes` states. It
# uses no program that a variable PATH could hide.
PYTHON = r"""#!/bin/bash
PATH=/usr/bin:/bin
printf '%s\0' "$@" > "$MACHINE/argv"
cat "/proc/$$/environ" > "$MACHINE/environ"
read -r code < "$MACHINE/codes"
sed -i 1d "$MACHINE/codes"
[ "$code" != long ] || trap 'exit 75' TERM  # Before a test can see that it runs.
echo "$PWD: $*: $LIBTPU_INIT_ARGS: $TFDS_DATA_DIR" >> "$MACHINE/runs"
case $code in
  stop) touch "$MACHINE/run/vit_jax/stop"; exit 75 ;;
  long) sleep 60 & wait $! ;;
esac
exit "$code"
"""


# Records argv and environ, unless it is called as pip.
CONTAINER_PYTHON = r"""#!/bin/bash
PATH=/usr/bin:/bin
[ "$2" != pip ] || exit 0
printf '%s\0' "$@" > {place}/argv
cat "/proc/$$/environ" > {place}/environ
"""


def split_at_nul(data: bytes) -> list[str]:
  """Split bytes that end with NUL as the arguments of a process are decoded."""
  return [os.fsdecode(word) for word in data.split(b'\0')[:-1]]


def parse_environ(data: bytes) -> dict[str, str]:
  """Parse /proc/PID/environ."""
  return dict(line.split('=', 1) for line in split_at_nul(data))


class Machine:
  """A simulated TPU VM."""

  def __init__(self, place: Path, job: Job = JOB):
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
    (place / 'pyproject.toml').write_text('', encoding='utf-8')
    with tarfile.open(self.launch / 'code.tar.gz', 'w:gz') as code:
      code.add(place / 'pyproject.toml', 'pyproject.toml')
    script = start_script(job)
    for folder in ('/run/', '/mnt/', '/var/', '/sys/', '/etc/', '/opt/'):
      script = script.replace(f' {folder}', f' {place}{folder}').replace(
        f'={folder}', f'={place}{folder}'
      )
    (place / 'start.sh').write_text(script, encoding='ascii')

  def program(self, path: Path, text: str):
    path.write_text(text, encoding='utf-8')
    path.chmod(0o755)

  def boot(self, *codes) -> subprocess.Popen:
    """Run the start script. The starts of its command exit with these codes, in sequence."""
    (self.place / 'codes').write_text(''.join(f'{code}\n' for code in codes), encoding='utf-8')
    return subprocess.Popen(
      ['bash', self.place / 'start.sh'], env=self.environment, start_new_session=True
    )

  def lines(self, name: str) -> list[str]:
    path = self.place / name
    return path.read_text(encoding='utf-8').splitlines() if path.exists() else []

  def argv(self, name: str = 'argv') -> list[str]:
    """Return the last arguments of the command. For another program, `name` is PROGRAM.argv."""
    return split_at_nul((self.place / name).read_bytes())

  def variables(self) -> dict[str, str]:
    """Return the environment in which the command was last started."""
    return parse_environ((self.place / 'environ').read_bytes())

  def exit_code(self) -> str | None:
    """Return the exit code that the script wrote for the babysitter, or None."""
    path = self.launch / 'exit/host-0'
    return path.read_text(encoding='utf-8').strip() if path.exists() else None

  def wait_for_run(self):
    """Wait until the command runs, for at most 20 s."""
    until = time.monotonic() + 20
    while not self.lines('runs') and time.monotonic() < until:
      time.sleep(0.02)
    assert self.lines('runs'), self.lines('var/log/vit_jax.log')


def container_variables(packed: str) -> dict[str, str]:
  """Return the variables that a container gets from xpk's --env-file.

  xpk takes NAME=VALUE from each line and puts VALUE between double quotes into YAML; Kubernetes
  then replaces $(NAME) in it.
  """
  lines = [line.split('=', 1) for line in packed.splitlines()]
  text = ''.join(f'- name: {name}\n  value: "{value}"\n' for name, value in lines)
  found = {each['name']: each['value'] for each in yaml.safe_load(text)}
  assert '$' not in ''.join(found.values())
  return found


def start_container(place: Path, job) -> tuple[list[str], dict[str, str]]:
  """Run the start script of a container. Return arguments and environment of its command."""
  files = make_start_files(job)
  (place / 'bin').mkdir(parents=True)
  (place / 'bin/python').write_text(CONTAINER_PYTHON.format(place=place), encoding='utf-8')
  (place / 'bin/python').chmod(0o755)
  (place / 'start.sh').write_text(files['/start.sh'], encoding='ascii')
  env = os.environ | {'PATH': f'{place}/bin:/usr/bin:/bin'} | container_variables(files['.env'])
  subprocess.run(['bash', 'start.sh'], cwd=place, env=env, check=True)
  read = lambda name: (place / name).read_bytes()
  return split_at_nul(read('argv')), parse_environ(read('environ'))
