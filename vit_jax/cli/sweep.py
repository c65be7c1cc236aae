"""The command `sweep`: choose settings on held-out training data, then train on all of them."""

import argparse
import copy
import itertools
import json
import re
import time
from pathlib import Path

from vit_jax.cli.arguments import (
  MODEL_FLAGS,
  add_host_flags,
  add_model_flags,
  duration,
  parse_host_flags,
)
from vit_jax.cli.finetune import (
  DATA_HELP,
  FINETUNE_MODEL_FLAGS,
  add_lora_flag,
  check_length_flags,
  format_train_command,
  open_photos,
  plan,
  planned_seconds,
  steps_in,
  with_steps,
)
from vit_jax.cli.results import format_csv, format_table
from vit_jax.errors import UserError
from vit_jax.recipes import differences_from_recipe

# Multiples of the learning rate, for recipes without rates to choose from and for plans.
LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
_HELD_OUT_SETTINGS = ('data.train', 'data.split', 'data.eval', 'data.eval_split')
_STEPS_FILE = 'steps.json'  # The number of steps that was fitted into --time.


def sweep(args: argparse.Namespace):
  """Choose settings on a held-out part of the training data, then train on all of it."""
  from vit_jax.cli.jobs import name_run, recipe_of_flags, training_runtime

  began, grid = time.monotonic(), parse_grid(args.grid, args.settings)
  check_sweep_flags(args)
  # The first point stands for all while the run is planned.
  settings = [*args.settings, *(f'--config.{name}={values[0]}' for name, values in grid.items())]
  check_length_flags(args.time, settings)
  source, images = open_photos(args.data) if args.data else ('', None)
  name = Path(source.partition(':')[2]).stem if source else name_run(recipe_of_flags(settings))
  root = Path(args.workdir or f'runs/sweep-{name}')
  with training_runtime(str(root), **parse_host_flags(args)) as runtime:
    import jax

    from vit_jax.paper.sweep import sweep

    if args.data:
      settings = plan_sweep(args, settings, source, images, root=root, began=began)
    runs = make_runs(settings, grid or default_grid(settings))
    points, best, result = sweep(runs, root, percent=args.held_out, **runtime)
    if jax.process_index() == 0:
      report = make_report(points, best, result, root=root, percent=args.held_out)
      write_report(report, root)
      print(format_report(report), end='')


def parse_grid(texts: list[str], settings: list[str]) -> dict[str, list[str]]:
  """Return {'optim.lr': ['0.01', '0.03'], …} of texts 'config.optim.lr=0.01,0.03'.

  Values that have commas are separated by semicolons. Raises UserError for another form, and for a
  setting that is given twice or that the sweep sets.
  """
  from vit_jax.cli.jobs import check_config_flags

  grid = {}
  for text in texts:
    match = re.fullmatch(r'-{0,2}config\.([\w.]+)=(.+)', text, flags=re.DOTALL)
    if not match:
      raise UserError(f'--grid {text}: expected config.FIELD=VALUE,VALUE, such as {_GRID_EXAMPLE}')
    name, values = match[1], [value for value in re.split(_separator(match[2]), match[2]) if value]
    check_config_flags([f'--config.{name}=0'])
    if name in grid or any(re.match(rf'--?config\.{name}(=|$)', flag) for flag in settings):
      raise UserError(f'--grid {text}: config.{name} is given twice')
    if len(set(values)) < len(values):
      raise UserError(f'--grid {text}: a value is given twice')
    if name in _HELD_OUT_SETTINGS:
      raise UserError(f'--grid {text}: all points of a grid have the same data')
    grid[name] = values
  return grid


def _separator(values: str) -> str:
  return ';' if ';' in values else ','


_GRID_EXAMPLE = 'config.optim.lr=0.003,0.01,0.03'


def check_sweep_flags(args):
  """Raise UserError unless there is either DATA with --init, or --config."""
  from vit_jax.cli.jobs import recipe_of_flags

  given = [
    name for name in ('init', 'time', 'lora', *MODEL_FLAGS) if getattr(args, name, None) is not None
  ]
  recipe = recipe_of_flags(args.settings)
  if args.data and recipe:
    raise UserError(f'{args.data} and --config={recipe}: give either DATA or --config')
  if args.data and not args.init:
    raise UserError(f'sweep {args.data} needs --init=MODEL')
  if not args.data and not recipe:
    raise UserError('sweep needs DATA with --init=MODEL, or --config=RECIPE as vit-jax train does')
  if given and not args.data:
    name = given[0]
    instead = '--config.init' if name == 'init' else 'the settings --config.FIELD'
    raise UserError(f'--{name} is for DATA; with --config use {instead}')


def plan_sweep(
  args, settings: list[str], source: str, images, *, root: Path, began: float
) -> list[str]:
  """Return the flags of `train` that `finetune` plans, with the number of steps of each run."""
  import jax

  from vit_jax.runtime.files import read_json_object, write_atomically

  args = copy.copy(args)
  args.settings = settings
  _, flags = plan(args, source, images)
  seconds, recorded = planned_seconds(args.time, settings), root / _STEPS_FILE
  if not seconds:
    return flags
  facts = {'flags': flags, 'seconds': seconds}
  known = read_json_object(recorded) if recorded.is_file() else {}
  if known.items() >= facts.items():
    return with_steps(flags, known['steps'])
  steps = steps_in(seconds, flags, root / 'none', began)
  if jax.process_index() == 0:
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(recorded, json.dumps(facts | {'steps': steps}, indent=1) + '\n')
  return with_steps(flags, steps)


def default_grid(settings: list[str]) -> dict[str, list[str]]:
  """Return the learning rates of the recipe, or multiples of the one in the settings."""
  from vit_jax.cli.jobs import parse_config_flags, recipe_of_flags
  from vit_jax.recipes import load_recipe, load_sweep_rates

  recipe = recipe_of_flags(settings)
  lr, rates = parse_config_flags(settings).optim.lr, load_sweep_rates(recipe)
  if not rates or lr != load_recipe(recipe).optim.lr:  # A plan, or the user's own rate.
    rates = tuple(float(f'{factor * lr:.3g}') for factor in LEARNING_RATE_FACTORS)
  return {'optim.lr': [f'{rate:g}' for rate in rates]}


def make_runs(settings: list[str], grid: dict[str, list[str]]) -> list:
  """Return a run for each point of the grid, in order. Raises UserError if one is not valid."""
  from vit_jax.cli.jobs import parse_config_flags, recipe_of_flags
  from vit_jax.config_checks import validate
  from vit_jax.paper.runs import ExperimentRun
  from vit_jax.settings.fields import flatten_config

  recipe, runs = recipe_of_flags(settings), []
  for values in itertools.product(*grid.values()):
    point = dict(zip(grid, values, strict=True))
    flags = [f'--config.{name}={value}' for name, value in point.items()]
    config = validate(parse_config_flags([*settings, *flags]))
    runs.append(
      ExperimentRun(
        row=' '.join(f'{name}={value}' for name, value in point.items()),
        column='',
        config=recipe,
        settings=differences_from_recipe(flatten_config(config), recipe),
      )
    )
  return runs


def make_report(points: list, best, result: dict, *, root: Path, percent: float) -> dict:
  """Return the outcome as the content of sweep.json."""
  from vit_jax.paper.runs import run_workdir
  from vit_jax.paper.sweep import last_run

  last = last_run(best)
  evaluation = [record for record in result['records'] if record['kind'] == 'eval'][-1]
  rows = [
    {
      'point': point.run.row,
      'accuracy': point.accuracy,
      'loss': point.loss,
      'hours': point.hours,
      'chosen': point.run is best,
      'failure': point.failure,
      'directory': str(point.directory),
    }
    for point in points
  ]
  directory = run_workdir(last, root)
  return {
    'held_out': f'{percent:g}%',
    'points': [
      {name: value for name, value in row.items() if value == value}  # Without NaN.
      for row in rows
    ],
    'best': best.row,
    'directory': str(directory),
    'command': format_train_command(last.build_config(), last.config, directory),
    'evaluation': {name: x for name, x in evaluation.items() if name not in ('step', 'kind')},
    'steps': evaluation['step'],
  }


def write_report(report: dict, root: Path):
  """Write sweep.json, and its table as sweep.csv."""
  from vit_jax.runtime.files import write_atomically

  columns = ('point', 'accuracy', 'loss', 'hours', 'chosen', 'failure', 'directory')
  rows = [[row.get(name, '') for name in columns] for row in report['points']]
  write_atomically(root / 'sweep.csv', format_csv([columns, *rows]))
  write_atomically(root / 'sweep.json', json.dumps(report, indent=1) + '\n')


def format_report(report: dict) -> str:
  """Return the table of the points, and the result of the last run."""
  from vit_jax.metrics.records import format_metrics

  rows = [('point', 'accuracy', 'loss', 'minutes', '')]
  for row in report['points']:
    numbers = [f'{row["accuracy"]:.2%}' if 'accuracy' in row else '-']
    numbers += [f'{row["loss"]:.4f}' if 'loss' in row else '-', f'{60 * row["hours"]:.1f}']
    rows.append(
      (row['point'], *numbers, 'chosen' if row['chosen'] else 'failed' * bool(row['failure']))
    )
  table = format_table(rows) if report['points'] else ''
  return (
    f'{table}{report["best"]}, on all training data: {format_metrics(report["evaluation"])}\n'
    f'the same by hand:\n  {report["command"]}\n\n'
    f'vit-jax predict --init {report["directory"]} IMAGE …\n'
  )


def percentage(text: str) -> float:
  """Parse '10%' as 10, up to a half."""
  try:
    if text.endswith('%') and 0 < float(text[:-1]) <= 50:
      return float(text[:-1])
  except ValueError:
    pass
  raise argparse.ArgumentTypeError(f'{text!r}: expected a percentage up to 50%, such as 10%')


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('sweep', help=sweep.__doc__, description=sweep.__doc__)
  command.set_defaults(function=sweep, takes_settings=True)
  command.epilog = (
    'Give DATA and --init as for finetune, or --config=RECIPE:ARGUMENT as for train. '
    '--config.FIELD=VALUE changes a setting of every run. The evaluation data are read once, by '
    'the last run.'
  )
  command.add_argument('data', nargs='?', metavar='DATA', help=DATA_HELP)
  command.add_argument(
    '--grid',
    action='append',
    default=[],
    metavar='config.FIELD=VALUE,VALUE',
    help='values of a setting to compare; several --grid make all combinations. Values with commas '
    "are separated by ';' (default: the recipe's learning rates, such as those of Table 4, or 0.3, "
    '1 and 3 times the planned one)',
  )
  command.add_argument(
    '--held_out',
    type=percentage,
    default=10.0,
    metavar='PERCENT',
    help='part of the training data of each class that is held out to compare (default: 10%%)',
  )
  command.add_argument(
    '--time', type=duration, metavar='TIME', help='time that each run on DATA may take, such as 5m'
  )
  command.add_argument(
    '--workdir',
    metavar='DIR',
    help='directory of the runs; existing ones are resumed (default: runs/sweep-NAME)',
  )
  add_lora_flag(command)
  add_model_flags(command, FINETUNE_MODEL_FLAGS, required=False)
  add_host_flags(command)
