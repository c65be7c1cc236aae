"""python -m vit_jax COMMAND: everything but the two main jobs."""

import os
import sys

from vit_jax.cli import (
  data,
  doctor,
  evaluate,
  export,
  figures,
  launch,
  plan,
  predict,
  selftrain,
  tables,
  verify,
)
from vit_jax.cli.arguments import Parser
from vit_jax.cli.jobs import run_and_report_errors


def build_parser() -> Parser:
  """The commands and their arguments."""
  top = Parser(
    prog='vit-jax',
    description='Vision Transformers; to train, see run_pretrain.py and run_finetune.py.',
  )
  commands = top.add_subparsers(required=True, metavar='COMMAND')
  for command in (
    data,
    predict,
    evaluate,
    figures,
    export,
    selftrain,
    plan,
    launch,
    doctor,
    tables,
    verify,
  ):
    command.add(commands)
  return top


def run_command():
  """Does what it says."""
  top = build_parser()
  args, args.settings = (
    top.parse_known_args()
  )  # Those of a run's config have a parser of their own.
  if args.settings and not hasattr(args, 'takes_settings'):
    top.error(f'unrecognized arguments: {" ".join(args.settings)}')
  args.function(args)


def main():
  """The command line; an error that the user can mend is one line and exit code 2."""
  try:
    run_and_report_errors(run_command)
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


if __name__ == '__main__':
  main()
