"""The command `models`: list the released checkpoints that load by name."""

import dataclasses
import json

from vit_jax.cli.results import STDOUT, check_output_paths, format_table, write_output
from vit_jax.errors import UserError

_COLUMNS = ('name', 'size', 'pixels', 'classes', 'accuracy', 'licence', 'note')


def models(args):
  """List the released checkpoints that `--init` takes by name, with their published accuracy."""
  from vit_jax.pretrained.catalogue import REPOSITORY_LICENCE, released_checkpoints

  check_output_paths(json=args.json)
  words = args.filter.lower().split()
  listed = [
    checkpoint
    for checkpoint in released_checkpoints().values()
    if all(word in f'{checkpoint.name} {checkpoint.labels}'.lower() for word in words)
  ]
  if not listed:
    raise UserError(
      f'no released checkpoint matches {args.filter!r}; without a filter all are listed'
    )
  objects = [dataclasses.asdict(each) | {'licence': REPOSITORY_LICENCE} for each in listed]
  if args.json != STDOUT:
    print(format_table([_COLUMNS, *map(_format_row, objects)]), end='')
    print(
      'Also: hf:ORG/NAME of the Hugging Face hub, and augreg/FILE, one of the 50,000 files of '
      "AugReg's list.\nThe licence is that of the repository that released the files."
    )
  write_output(json.dumps(objects, indent=1) + '\n', args.json)


def _format_row(facts: dict) -> tuple[str, ...]:
  """Return the cells of a checkpoint; '-' is unknown."""
  accuracy = '-' if facts['accuracy'] is None else f'{facts["accuracy"]:.2f}%'
  cells = facts | {'accuracy': accuracy}
  return tuple('-' if cells[name] in (None, '') else str(cells[name]) for name in _COLUMNS)


def add(commands):
  """Add the parser of the command."""
  command = commands.add_parser('models', help=models.__doc__, description=models.__doc__)
  command.set_defaults(function=models)
  command.add_argument(
    'filter', nargs='?', default='', help="words in the name or the labels, such as 'B_16 sam'"
  )
  command.add_argument(
    '--json', metavar='FILE', help='write a JSON list of objects; - prints it instead of the table'
  )
