"""train: pre-train or fine-tune with a recipe. run_pretrain.py and run_finetune.py wrap it."""

import argparse
from pathlib import Path

from vit_jax.cli.arguments import Parser, add_host_flags, parse_host_flags, positive_int
from vit_jax.cli.jobs import (
  default_workdir,
  parse_config_flags,
  recipe_of_flags,
  run_and_report_errors,
  training_runtime,
)
from vit_jax.cli.report import add_report_flag, write_run_report
from vit_jax.config_checks import validate
from vit_jax.runtime.cluster import HEARTBEAT_TIMEOUT

_OPTIONS = (
  'config', 'workdir', 'coordinator', 'processes', 'process', 'hosts_timeout', 'hosts_heartbeat',
  'report', 'dry_run',
)  # fmt: skip


def train(args: argparse.Namespace):
  """Train a model with a recipe, or resume the run in --workdir."""
  recipe = recipe_of_flags(args.settings) or args.default_recipe
  config = validate(parse_config_flags(args.settings, default=recipe, options=_OPTIONS))
  if args.dry_run:
    from vit_jax.training.dry_run import dry_run

    print('\n'.join(dry_run(config)))
    return
  workdir = Path(args.workdir or default_workdir(recipe))
  hosts = parse_host_flags(args) | {'heartbeat': args.hosts_heartbeat}
  with training_runtime(args.workdir, **hosts) as runtime:
    from vit_jax.train import train

    train(config, workdir, **runtime)
    if args.report:
      write_run_report(workdir, runtime['watchdog'])


def run_train_job(default_recipe: str):
  """Run `train` with the arguments of this process. It is the main function of run_*.py."""

  def job():
    parser = Parser(description=train.__doc__)
    _add_arguments(parser, default_recipe)
    args, args.settings = parser.parse_known_args()
    train(args)

  run_and_report_errors(job)


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('train', help=train.__doc__, description=train.__doc__)
  command.set_defaults(function=train, takes_settings=True)
  _add_arguments(command, 'quickstart')


def _add_arguments(command: argparse.ArgumentParser, default_recipe: str):
  """Add the arguments of `train`, except those of the config, which have a parser of their own."""
  command.set_defaults(default_recipe=default_recipe)
  command.epilog = (
    f'--config=RECIPE[:ARGUMENT] selects the recipe, by default {default_recipe}: a name such as '
    'finetune:B/16,cifar10, or a file. --config.FIELD=VALUE changes one of its settings.'
  )
  command.add_argument(
    '--workdir',
    metavar='DIR',
    help='run directory; an existing run is resumed; by default runs/RECIPE-TIME',
  )
  command.add_argument(
    '--dry_run',
    action='store_true',
    help='trace the train step, print steps, epochs, FLOPs and all settings, and train nothing',
  )
  add_report_flag(command)
  add_host_flags(command)
  command.add_argument(
    '--hosts_heartbeat',
    type=positive_int,
    default=HEARTBEAT_TIMEOUT,
    metavar='SECONDS',
    help=f'time without a heartbeat until a host counts as lost (default: {HEARTBEAT_TIMEOUT})',
  )
