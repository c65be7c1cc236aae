"""The command `verify`: check that a run directory is intact."""

from collections.abc import Callable
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr


def verify(args):
  """Check every file of a run directory and print which are good. Changes nothing.

  The exit code is 1 if a file is damaged, or if there is no checkpoint.
  """
  from absl import logging

  from vit_jax.checkpoint.io import verify_checkpoint
  from vit_jax.checkpoint.manager import LEFTOVER_NAME, list_saved_steps
  from vit_jax.checkpoint.run_directory import (
    read_run_config,
    read_run_labels,
    read_run_preprocessing,
  )

  logging.set_verbosity(logging.FATAL)  # Hide what Orbax logs about damaged files.
  workdir, checkpoints = args.workdir, args.workdir / 'checkpoints'
  steps = sorted(list_saved_steps(checkpoints))
  checks = {
    'config.json': lambda: read_run_config(workdir) and '',
    'preprocessing.json': lambda: read_run_preprocessing(workdir) and '',
    'labels.txt': lambda: f'{len(read_run_labels(workdir)):,} classes',
  }
  for step in steps:
    checks[f'checkpoints/{step}'] = lambda path=checkpoints / str(step): verify_checkpoint(path)
  are_good = [_print_check(name, check) for name, check in checks.items()]
  for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
    if LEFTOVER_NAME.fullmatch(path.name):
      print_stderr(
        f'checkpoints/{path.name} is the rest of an interrupted save: resuming the run removes it'
      )
  if not steps:
    print_stderr(f'{workdir} has no checkpoint')
  raise SystemExit(0 if all(are_good) and steps else 1)


def _print_check(name: str, check: Callable[[], str]) -> bool:
  """Print the details that `check` returns, or its UserError. Return True if there is none."""
  try:
    print(f'{name:<24}  good  {check()}'.rstrip(), flush=True)
  except UserError as error:
    print(f'{name:<24}  DAMAGED  {error}', flush=True)
    return False
  return True


def add(commands):
  """Add the parser of the command."""
  help = verify.__doc__.partition('.')[0]
  command = commands.add_parser('verify', help=help, description=verify.__doc__)
  command.set_defaults(function=verify)
  command.add_argument('workdir', type=Path, metavar='WORKDIR', help='the run directory')
