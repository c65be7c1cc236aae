"""selftrain: a teacher, the labels that it gives to unlabelled images, a noised student, who is the next teacher, …"""

from pathlib import Path

from vit_jax.cli.arguments import add_hosts, hosts_of
from vit_jax.cli.results import format_table
from vit_jax.errors import UserError


def self_train(args):
  """Trains students on labelled images and on what a teacher says of others (Noisy Student); stages that are done stay."""
  from vit_jax.cli.jobs import parse_config_flags, training_runtime

  students = [parse_config_flags([f'--config={file}', *args.settings]) for file in args.students]
  is_config = args.teacher.partition(':')[0].endswith('.py')
  teacher = (
    parse_config_flags([f'--config={args.teacher}', *args.settings]) if is_config else args.teacher
  )
  with training_runtime(args.workdir, **hosts_of(args)) as alive:
    import jax

    from vit_jax.training.self_training import self_train

    results = self_train(teacher, students, Path(args.workdir), **alive)
    if jax.process_index() == 0:
      print(format_stage_table(results), end='')


def format_stage_table(results: dict[str, dict]) -> str:
  """The last evaluation of each run."""
  measure = lambda result: next(
    ((name, value) for name, value in result.items() if name.endswith('_accuracy')), None
  )
  rows = [
    (name, found[0], f'{found[1]:.2%}')
    for name, result in results.items()
    if (found := measure(result))
  ]
  if not rows:
    raise UserError('none of the stages has an accuracy')
  return format_table(rows)


def add(commands):
  """The arguments."""
  command = commands.add_parser(
    'selftrain', help=self_train.__doc__, description=self_train.__doc__
  )
  command.set_defaults(function=self_train, takes_settings=True)
  option = command.add_argument
  option(
    '--teacher',
    required=True,
    metavar='WHAT',
    help='a config FILE:ARGUMENT to train, or a model: a run directory, a file, …',
  )
  option(
    '--students',
    required=True,
    nargs='+',
    metavar='FILE:ARGUMENT',
    help='a config each, of one generation after another',
  )
  option(
    '--workdir', required=True, metavar='DIR', help='where the stages are kept, and taken up again'
  )
  add_hosts(command)
  command.epilog = '--config.FIELD=VALUE changes a setting of every run.'
