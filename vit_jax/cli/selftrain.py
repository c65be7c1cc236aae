"""selftrain: a teacher labels images, a student learns from them and is the next teacher."""

from pathlib import Path

from vit_jax.cli.arguments import add_host_flags, parse_host_flags
from vit_jax.cli.results import format_table
from vit_jax.errors import UserError


def self_train(args):
  """Train students on labelled and teacher-labelled images (Noisy Student), or resume."""
  from vit_jax.cli.jobs import parse_config_flags, training_runtime
  from vit_jax.recipes import is_recipe

  def read_config(recipe: str):
    return parse_config_flags([f'--config={recipe}', *args.settings])

  students = [read_config(recipe) for recipe in args.students]
  teacher = read_config(args.teacher) if is_recipe(args.teacher) else args.teacher
  with training_runtime(args.workdir, **parse_host_flags(args)) as runtime:
    import jax

    from vit_jax.train import train
    from vit_jax.training.self_training import self_train

    results = self_train(teacher, students, Path(args.workdir), train=train, **runtime)
    if jax.process_index() == 0:
      print(format_stage_table(results), end='')


def format_stage_table(results: dict[str, dict]) -> str:
  """Return a table of the accuracy of each stage that has one.

  Raises UserError if no stage has an accuracy.
  """
  rows = []
  for stage, result in results.items():
    measures = [name for name in result if name.endswith('_accuracy')]
    rows += [(stage, name, f'{result[name]:.2%}') for name in measures[:1]]
  if not rows:
    raise UserError('none of the stages has an accuracy')
  return format_table(rows)


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser(
    'selftrain', help=self_train.__doc__, description=self_train.__doc__
  )
  command.set_defaults(function=self_train, takes_settings=True)
  command.add_argument(
    '--teacher',
    required=True,
    metavar='RECIPE|MODEL',
    help='recipe NAME:ARGUMENT to train, or a model: a run directory, a file or a catalogue name',
  )
  command.add_argument(
    '--students',
    required=True,
    nargs='+',
    metavar='RECIPE',
    help='one recipe NAME:ARGUMENT for each generation',
  )
  command.add_argument(
    '--workdir',
    required=True,
    metavar='DIR',
    help='directory of the stages; existing stages are resumed',
  )
  add_host_flags(command)
  command.epilog = '--config.FIELD=VALUE changes a setting of every run.'
