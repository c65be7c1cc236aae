"""The commands of a launch, as text that a user could type."""

import re
import shlex

from vit_jax.launch.job import Job
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


def format_dry_run(job: Job, pack: list[str], script: str) -> str:
  """Return every command in order, and the script. FILES stands for a temporary folder."""
  backend = BACKENDS[job.backend]
  commands = [pack, *upload_commands(job, 'FILES'), *backend.create_commands(job, 'FILES')]
  after = [
    ('status', [backend.describe_command(job)]),
    ('logs', list(backend.log_commands(job, {}).values())[:1]),
    ('delete', backend.delete_commands(job)),
  ]
  parts = ['\n\n'.join(map(format_command, commands)), f'# FILES/start.sh\n{script}']
  parts += [
    f'# launch {verb} {job.name}\n' + '\n'.join(map(format_command, steps)) for verb, steps in after
  ]
  return '\n\n'.join(part.rstrip() for part in parts)


def format_command(command: list[str]) -> str:
  """Format a command as a user would type it, with one flag a line if it is long."""
  words = [
    re.sub(r"^'(--\w[\w-]*=)", r"\1'", shlex.quote(word)) for word in command
  ]  # --command='…'
  if len(' '.join(words)) <= 110:
    return ' '.join(words)
  lines = [words[0]]
  for word in words[1:]:
    lines = [*lines, word] if word.startswith('--') else [*lines[:-1], f'{lines[-1]} {word}']
  return ' \\\n  '.join(lines)
