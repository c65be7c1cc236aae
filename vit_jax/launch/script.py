"""The script that every worker runs.

It may run again at any time, and then continues where it was.
"""

import shlex

from vit_jax.errors import RESTARTABLE_EXIT_CODES
from vit_jax.launch.job import DATA, WORKDIR, Job, split_bucket_url

HOST_LOG = '/var/log/vit_jax.log'
# One host writes the run's folder and all read it: nothing may be cached. Orbax renames folders.
WORKDIR_OPTIONS = {'rename-dir-limit': '200000', 'metadata-cache-ttl-secs': '0'}
# Data does not change: everything is cached.
DATA_OPTIONS = {
  'metadata-cache-ttl-secs': '-1',
  'stat-cache-max-size-mb': '-1',
  'type-cache-max-size-mb': '-1',
}

HEADER_TEMPLATE = """\
#!/usr/bin/env bash
# {name}: {command}
# Runs on every worker at every boot. Finished steps are skipped.
# The run resumes from its last checkpoint.
set -euo pipefail
"""

MACHINE_TEMPLATE = """\
mkdir -p /run/vit_jax {mounts}
exec 9> /run/vit_jax/lock
flock --nonblock 9 || exit 0  # Already running.
exec >> {log} 2>&1
again() {{ for pause in 5 20 60; do "$@" && return; sleep "$pause"; done; "$@"; }}
echo always > /sys/kernel/mm/transparent_hugepage/enabled

if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  again curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg -o "$key"
  repository="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  echo "deb [signed-by=$key] $repository" \\
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
  again python3 -m uv pip install --quiet --python "$code/.venv/bin/python" \\
    --constraint "$launch/pins.txt" "${{code}}[tpu]"
  touch "$code/installed"
fi
cd "$code"
"""

RUN_TEMPLATE = """\
trap 'trap - EXIT; exit 143' TERM  # A preemption is not the end of the run.
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

CONTAINER_TEMPLATE = """\
python -m pip install --quiet --root-user-action=ignore --constraint pins.txt '.[tpu]'
"""


def machine_script(job: Job) -> str:
  """Return the start-up script of a TPU VM, which runs as root."""
  mounts = [(job.workdir, WORKDIR, WORKDIR_OPTIONS, False)] + (
    [(job.data, DATA, DATA_OPTIONS, True)] if job.data else []
  )
  machine = MACHINE_TEMPLATE.format(
    mounts=' '.join(place for _, place, _, _ in mounts),
    log=HOST_LOG,
    mount_commands='\n'.join(mount_command(*each) for each in mounts),
    workdir=WORKDIR,
    name=job.name,
    commit=job.commit,
    python=job.python,
  )
  return '\n'.join(
    [
      script_header(job),
      machine,
      export_lines(job),
      RUN_TEMPLATE.format(
        command=shlex.join(job.command), again='|'.join(map(str, RESTARTABLE_EXIT_CODES))
      ),
    ]
  )


def container_script(job: Job) -> str:
  """Return the script of a container on GKE.

  Its image has the code, its volumes are mounted, and JobSet restarts it.
  """
  return '\n'.join(
    [
      script_header(job),
      CONTAINER_TEMPLATE,
      export_lines(job),
      f'exec python {shlex.join(job.command)}\n',
    ]
  )


def script_header(job: Job) -> str:
  """Return the first lines of a script."""
  return HEADER_TEMPLATE.format(name=job.name, command=shlex.join(job.command))


def export_lines(job: Job) -> str:
  """Return the lines that set the environment of the command."""
  own = {'PYTHONUNBUFFERED': '1', 'JAX_COMPILATION_CACHE_DIR': f'{WORKDIR}/launch/compiled'}
  own |= {'TFDS_DATA_DIR': DATA} if job.data else {}
  return ''.join(f'export {name}={shlex.quote(value)}\n' for name, value in (own | job.env).items())


def mount_command(url: str, place: str, options: dict[str, str], readonly: bool) -> str:
  """Return the line that mounts a folder of a bucket unless it is mounted."""
  name, path = split_bucket_url(url)
  flags = ['--implicit-dirs', *(f'--{option}={value}' for option, value in options.items())]
  flags += ([f'--only-dir={path}'] if path else []) + (['-o', 'ro'] if readonly else [])
  # The mount outlives the script: it must not hold the lock.
  return f'mountpoint -q {place} || again {shlex.join(["gcsfuse", *flags, name, place])} 9>&-'
