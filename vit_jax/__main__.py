"""The command line: python -m vit_jax COMMAND, or vit-jax COMMAND."""

import os
import sys

from vit_jax.cli import (
  data,
  doctor,
  evaluate,
  export,
  figures,
  finetune,
  launch,
  models,
  plan,
  predict,
  push,
  report,
  reproduce,
  selftrain,
  sweep,
  tables,
  train,
  verify,
)  # fmt: skip
from vit_jax.cli.arguments import Parser
from vit_jax.cli.jobs import run_and_report_errors
from vit_jax.runtime.huge_pages import restart_with_huge_pages

_COMMANDS = (
  finetune, train, sweep, data, models, predict, evaluate, report, figures, export, push, selftrain,
  plan, launch, doctor, tables, reproduce,
  verify,
)  # fmt: skip


def build_parser() -> Parser:
  """Return the parser of all commands."""
  parser = Parser(prog='vit-jax', description='Train, evaluate and export Vision Transformers.')
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for command in _COMMANDS:
    command.add(commands)
  return parser


def run_command():
  """Parse the command line and run the command."""
  parser = build_parser()
  # --config.FIELD=VALUE is parsed separately, by jobs.parse_config_flags.
  args, args.settings = parser.parse_known_args()
  if args.settings and not hasattr(args, 'takes_settings'):
    parser.error(f'unrecognized arguments: {" ".join(args.settings)}')
  args.function(args)


def main():
  """Run the command line. Print a UserError as one line, and exit with its code."""
  try:
    run_and_report_errors(run_command)
    sys.stdout.flush()
  except BrokenPipeError:  # The reader, such as `head`, has closed the pipe: discard the rest.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def run_program():
  """Run the command line as a program, with huge pages of memory."""
  restart_with_huge_pages()
  main()


if __name__ == '__main__':
  run_program()
