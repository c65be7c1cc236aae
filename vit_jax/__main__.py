"""python -m vit_jax COMMAND: everything but the two main jobs."""

import os
import sys

from vit_jax.commands import data, evaluate, export, predict
from vit_jax.commands.arguments import Parser
from vit_jax.entry import one_line_errors


def parser() -> Parser:
  """The commands and their arguments."""
  top = Parser(prog='vit-jax', description='Vision Transformers; to train, see run_pretrain.py and run_finetune.py.')
  commands = top.add_subparsers(required=True, metavar='COMMAND')
  for command in (data, predict, evaluate, export):
    command.add(commands)
  return top


def command_line():
  """Does what it says."""
  args = parser().parse_args()
  args.function(args)


def main():
  """The command line; an error that the user can mend is one line and exit code 2."""
  try:
    one_line_errors(command_line)
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


if __name__ == '__main__':
  main()
