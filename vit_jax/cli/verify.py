"""verify: is a run's directory as it was written?"""

from collections.abc import Callable
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr


def verify(args):
  """Reads all that a run's directory holds and says which parts are good. Changes nothing. Exit code 1: not all are."""
  from absl import logging

  from vit_jax.checkpoint.io import verify_checkpoint
  from vit_jax.checkpoint.manager import LEFTOVER_NAME, list_saved_steps
  from vit_jax.checkpoint.run_directory import (
    read_run_config,
    read_run_labels,
    read_run_preprocessing,
  )

  logging.set_verbosity(logging.FATAL)  # Orbax's own account of what is damaged.
  workdir, place = args.workdir, args.workdir / 'checkpoints'
  saved = sorted(list_saved_steps(place))
  good = [
    verdict('config.json', lambda: read_run_config(workdir) and ''),
    verdict('preprocessing.json', lambda: read_run_preprocessing(workdir) and ''),
    verdict('labels.txt', lambda: f'{len(read_run_labels(workdir)):,} classes'),
    *(
      verdict(f'checkpoints/{step}', lambda step=step: verify_checkpoint(place / str(step)))
      for step in saved
    ),
  ]
  for path in sorted(place.iterdir()) if place.is_dir() else []:
    if LEFTOVER_NAME.fullmatch(path.name):
      print_stderr(f'checkpoints/{path.name} was interrupted: the run removes it when it goes on')
  if not saved:
    print_stderr(f'{workdir} holds no checkpoint')
  raise SystemExit(0 if all(good) and saved else 1)


def verdict(name: str, examine: Callable[[], str]) -> bool:
  """Prints a line: what `verify_checkpoint` found, or what is wrong."""
  try:
    print(f'{name:<24}  good  {examine()}'.rstrip(), flush=True)
    return True
  except UserError as error:
    print(f'{name:<24}  DAMAGED  {error}', flush=True)
    return False


def add(commands):
  """The arguments."""
  command = commands.add_parser(
    'verify', help=verify.__doc__.partition('.')[0], description=verify.__doc__
  )
  command.set_defaults(function=verify)
  command.add_argument('workdir', type=Path, metavar='WORKDIR', help='of a run')
