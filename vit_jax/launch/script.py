"""What every worker runs: a script that may run again at any time, and goes on where it was."""

import shlex

from vit_jax.errors import RESTARTABLE_EXIT_CODES
from vit_jax.launch.job import DATA, WORKDIR, Job, bucket

LOG = '/var/log/vit_jax.log'
# The run's own folder is written by one host and read by all: nothing of it may be remembered. Orbax renames folders.
WORKDIR_OPTIONS = {'rename-dir-limit': '200000', 'metadata-cache-ttl-secs': '0'}
# Data does not change: everything is remembered.
DATA_OPTIONS = {
  'metadata-cache-ttl-secs': '-1',
  'stat-cache-max-size-mb': '-1',
  'type-cache-max-size-mb': '-1',
}

HEAD = """\
#!/usr/bin/env bash
# {name}: {command}
# Runs on every worker at every boot. What is done is not done again, and the run goes on from its last checkpoint.
set -euo pipefail
"""

MACHINE = """\
mkdir -p /run/vit_jax {mounts}
exec 9> /run/vit_jax/lock
flock --nonblock 9 || exit 0  # It is running.
exec >> {log} 2>&1
again() {{ for pause in 5 20 60; do "$@" && return; sleep "$pause"; done; "$@"; }}
echo always > /sys/kernel/mm/transparent_hugepage/enabled

if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  again curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg -o "$key"
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \\
    > /etc/apt/sources.list.d/gcsfuse.list
  again apt-get -o DPkg::Lock::Timeout=600 update
  again apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse
fi
{mount_commands}

launch={workdir}/launch/{name}
mkdir -p "$launch/exit"
rm -f "$launch/exit/$HOSTNAME" /run/vit_jax/stop
trap 'ended=$?; echo "exit code $ended"; echo "$ended" > "$launch/exit/$HOSTNAME"' EXIT

code=/opt/vit_jax/{commit}
if [ ! -e "$code/installed" ]; then
  rm -rf "$code"
  mkdir -p "$code"
  tar -xzf "$launch/code.tar.gz" -C "$code"
  again python3 -m pip install --quiet uv
  again python3 -m uv venv --quiet --python {python} "$code/.venv"
  again python3 -m uv pip install --quiet --python "$code/.venv/bin/python" --constraint "$launch/pins.txt" "${{code}}[tpu]"
  touch "$code/installed"
fi
cd "$code"
"""

RUN = """\
trap 'trap - EXIT; exit 143' TERM  # The machine is taken away, which is no end of the run.
while true; do
  ended=0
  .venv/bin/python {command} &
  echo $! > /run/vit_jax/pid
  wait $! || ended=$?
  case "$ended" in {again}) ;; *) exit "$ended" ;; esac
  [ ! -e /run/vit_jax/stop ] || exit "$ended"
  echo "exit code $ended: starting it again"
done
"""

CONTAINER = """\
python -m pip install --quiet --root-user-action=ignore --constraint pins.txt '.[tpu]'
"""


def machine_script(job: Job) -> str:
  """The start-up script of a TPU VM, as root."""
  mounts = [(job.workdir, WORKDIR, WORKDIR_OPTIONS, False)] + (
    [(job.data, DATA, DATA_OPTIONS, True)] if job.data else []
  )
  machine = MACHINE.format(
    mounts=' '.join(place for _, place, _, _ in mounts),
    log=LOG,
    mount_commands='\n'.join(mount(*each) for each in mounts),
    workdir=WORKDIR,
    name=job.name,
    commit=job.commit,
    python=job.python,
  )
  return '\n'.join(
    [
      head(job),
      machine,
      exports(job),
      RUN.format(command=shlex.join(job.command), again='|'.join(map(str, RESTARTABLE_EXIT_CODES))),
    ]
  )


def container_script(job: Job) -> str:
  """What a container on GKE runs: its image has the code, its volumes are mounted, and JobSet starts it again."""
  return '\n'.join([head(job), CONTAINER, exports(job), f'exec python {shlex.join(job.command)}\n'])


def head(job: Job) -> str:
  """What the script is."""
  return HEAD.format(name=job.name, command=shlex.join(job.command))


def exports(job: Job) -> str:
  """The environment of the command."""
  own = {'PYTHONUNBUFFERED': '1', 'JAX_COMPILATION_CACHE_DIR': f'{WORKDIR}/launch/compiled'}
  own |= {'TFDS_DATA_DIR': DATA} if job.data else {}
  return ''.join(f'export {name}={shlex.quote(value)}\n' for name, value in (own | job.env).items())


def mount(url: str, place: str, options: dict[str, str], readonly: bool) -> str:
  """The line that mounts a folder of a bucket, where it is not mounted yet."""
  name, path = bucket(url)
  flags = ['--implicit-dirs', *(f'--{option}={value}' for option, value in options.items())]
  flags += ([f'--only-dir={path}'] if path else []) + (['-o', 'ro'] if readonly else [])
  return f'mountpoint -q {place} || again {shlex.join(["gcsfuse", *flags, name, place])} 9>&-'  # It stays: without the lock.
