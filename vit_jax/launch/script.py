"""The script that every worker runs.

It may run again at any time, and then continues where it was.
"""

import textwrap

from vit_jax.errors import RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch.environment import PACKED_NAME, export_lines, public_part, secret_part
from vit_jax.launch.job import DATA, WORKDIR, Job, split_bucket_url
from vit_jax.launch.shell import join_words

HOST_LOG = '/var/log/vit_jax.log'
# One host writes the run's folder and all read it: nothing may be cached. Orbax renames folders.
WORKDIR_OPTIONS = {'rename-dir-limit': '200000', 'metadata-cache-ttl-secs': '0'}
# Data does not change: everything is cached.
DATA_OPTIONS = {
  'metadata-cache-ttl-secs': '-1',
  'stat-cache-max-size-mb': '-1',
  'type-cache-max-size-mb': '-1',
}

MAX_SCRIPT_BYTES = 256 * 1024  # Limit of Google Cloud for one entry of metadata.

HEADER_TEMPLATE = """\
#!/usr/bin/env bash
# Job {name}.
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

# Variables are set in a subshell: their names may be names of the script.
RUN_TEMPLATE = """\
run() {{
{exports}
  exec .venv/bin/python {command}
}}
trap 'trap - EXIT; exit 143' TERM  # A preemption is not the end of the run.
while true; do
  ended=0
  run &
  echo $! > /run/vit_jax/pid
  wait $! || ended=$?
  case "$ended" in {again}) ;; *) exit "$ended" ;; esac
  [ ! -e /run/vit_jax/stop ] || exit "$ended"
  echo "exit code $ended: starting it again"
done
"""

CONTAINER_TEMPLATE = """\
python -m pip install --quiet --root-user-action=ignore --constraint pins.txt '.[tpu]'

{exports}
set -- "$(command -v python)" {command}
environment=$(base64 --decode <<< "${packed_name}")
unset {packed_name}
set -o allexport
eval "$environment"  # The values of --env.
exec "$@"
"""


def start_script(job: Job, *, masked: bool = False) -> str:
  """Return the script that every worker runs, with masked values of `--env` or with all.

  Raises UserError if it is too long for the cloud.
  """
  script = container_script(job) if job.backend == 'gke' else machine_script(job, masked=masked)
  if len(script) > MAX_SCRIPT_BYTES:
    raise UserError(
      f'the start script has {len(script)} bytes, and the cloud takes {MAX_SCRIPT_BYTES}; put '
      'long values of --env and long arguments into a file in --data or --workdir'
    )
  return script


def machine_script(job: Job, *, masked: bool) -> str:
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
  exports = public_exports(job) + export_lines(secret_part(job.env), masked=masked)
  run = RUN_TEMPLATE.format(
    exports=textwrap.indent(exports, '  ').rstrip(),
    command=join_words(job.command),
    again='|'.join(map(str, RESTARTABLE_EXIT_CODES)),
  )
  return '\n'.join([script_header(job), machine, run])


def container_script(job: Job) -> str:
  """Return the script of a container on GKE.

  Its image has the code, its volumes are mounted, and JobSet restarts it. Anyone who may pull the
  image can read the script: the values of `--env` come as a variable of the container.
  """
  container = CONTAINER_TEMPLATE.format(
    exports=public_exports(job), command=join_words(job.command), packed_name=PACKED_NAME
  )
  return '\n'.join([script_header(job), container])


def script_header(job: Job) -> str:
  """Return the first lines of a script."""
  return HEADER_TEMPLATE.format(name=job.name)


def public_exports(job: Job) -> str:
  """Return the lines that set the variables of the command that are no secrets."""
  own = {'PYTHONUNBUFFERED': '1', 'JAX_COMPILATION_CACHE_DIR': f'{WORKDIR}/launch/compiled'}
  own |= {'TFDS_DATA_DIR': DATA} if job.data else {}
  return export_lines(own | public_part(job.env))


def mount_command(url: str, place: str, options: dict[str, str], readonly: bool) -> str:
  """Return the line that mounts a folder of a bucket unless it is mounted."""
  name, path = split_bucket_url(url)
  flags = ['--implicit-dirs', *(f'--{option}={value}' for option, value in options.items())]
  flags += ([f'--only-dir={path}'] if path else []) + (['-o', 'ro'] if readonly else [])
  # The mount outlives the script: it must not hold the lock.
  return f'mountpoint -q {place} || again {join_words(["gcsfuse", *flags, name, place])} 9>&-'
