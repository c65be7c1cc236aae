"""The commands of a launch, as text that a user could type."""

from vit_jax.launch.environment import format_packing, masked_value
from vit_jax.launch.job import Job
from vit_jax.launch.script import start_script
from vit_jax.launch.shell import format_command, quote_word, wrap_words
from vit_jax.launch.watch import BACKENDS


def upload_commands(job: Job, files: str) -> list[list[str]]:
  """Return the commands that run before the job is created.

  A virtual machine takes the code from the bucket; a container image contains it.
  """
  kept = [
    'gcloud',
    'storage',
    'cp',
    f'{files}/code.tar.gz',
    f'{files}/pins.txt',
    f'{job.launch_dir}/',
  ]
  unpacked = [['tar', '-xzf', f'{files}/code.tar.gz', '-C', files], ['rm', f'{files}/code.tar.gz']]
  return [kept, *(unpacked if job.backend == 'gke' else [])]


def format_dry_run(job: Job, pack: list[str]) -> str:
  """Return every command in order, and the script. FILES stands for a temporary folder.

  The values of `--env` are taken from the variables of the shell that runs the commands.
  """
  backend = BACKENDS[job.backend]
  commands = [pack, *upload_commands(job, 'FILES'), *backend.create_commands(job, 'FILES')]
  after = [
    ('status', [backend.describe_command(job)]),
    ('logs', list(backend.log_commands(job, {}).values())[:1]),
    ('delete', backend.delete_commands(job)),
  ]
  packing = [format_packing(job.env, 'FILES.env')] if job.backend == 'gke' else []
  script = f'# FILES/start.sh\n{start_script(job, masked=True)}'
  parts = ['\n\n'.join([*packing, *map(format_command, commands)]), script]
  parts += [
    f'# launch {verb} {job.name}\n' + '\n'.join(map(format_command, steps)) for verb, steps in after
  ]
  return '\n\n'.join(part.rstrip() for part in parts)


def format_local_command(own: dict[str, str], env: dict[str, str], command: list[str]) -> str:
  """Return the command of one host. `env` has the values of `--env`, which are not shown."""
  shown = {name: quote_word(value) for name, value in own.items()}
  shown |= {name: masked_value(name) for name in env}
  words = [f'{name}={value}' for name, value in shown.items()]
  return wrap_words([*words, 'python', *map(quote_word, command)])
