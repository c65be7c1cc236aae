"""tables: make a table or figure of the paper, at full scale or in miniature, and compare it."""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

from vit_jax.cli.arguments import non_negative_int, positive_int
from vit_jax.cli.report import write_experiment_report
from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr


def tables(args):
  """List every table and figure of the paper, or make one at full scale or in miniature."""
  name = args.name or 'list'
  if name == 'list' or args.list:
    print_reproductions()
  elif args.from_released:
    run_from_released(args, name)
  elif name == 'mini':
    run_miniatures(args)
  elif args.scale == 'mini':
    run_miniatures(args, only=name)
  elif args.dry_run:
    print_dry_run(args, name)
  elif name in ('fig12', 'figure12'):
    print_speeds(args)
  else:
    run_full_scale(args, name)


def print_reproductions():
  """Print a paragraph for each table and figure; a table of them is wider than a screen."""
  from vit_jax.paper.reproductions import list_reproductions

  for name, title, command, needs, status in list_reproductions():
    print(f'{name:9} {title}\n{"":9} {command}\n{"":9} needs {needs}\n{"":9} {status}')


def print_dry_run(args, name: str):
  """Print the commands of a table at full scale, their cost and their data."""
  from vit_jax.paper.reproductions import format_dry_run

  mfu = read_mfu(args)
  for line in format_dry_run(
    name, root=Path(args.root), standin=args.standin, chip=args.chip, mfu=mfu
  ):
    print(line)


def read_mfu(args) -> float:
  """Return the model FLOPs utilization of --plan or --mfu, as a fraction.

  Raises UserError if --plan is not a file of `plan --json`.
  """
  from vit_jax.tpu.cost import ASSUMED_MFU

  if not args.plan:
    return args.mfu / 100 if args.mfu else ASSUMED_MFU
  try:
    return json.loads(Path(args.plan).read_text(encoding='utf-8'))['mfu']
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'--plan {args.plan}: expected a file written by `plan --json FILE`, got {error!r}'
    ) from None


def run_full_scale(args, name: str):
  """Train the runs of a table here, one at a time, and print them next to the paper's numbers."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.full_scale import replace_jft
  from vit_jax.paper.reproductions import (
    find_reproduction,
    format_reproduction_title,
    reproduction_paper_cells,
  )
  from vit_jax.paper.results_page import format_paper_comparison
  from vit_jax.paper.runner import execute_runs, write_records_csv

  item = find_reproduction(name)
  if not item.make_runs:
    raise UserError(f'{format_reproduction_title(name)} is made by {item.command}')
  enable_compilation_cache()
  runs = [replace_jft(run) if args.standin else run for run in item.make_runs()]
  records = execute_runs(runs, Path(args.root))
  path = Path(args.out or 'results') / f'{name}.csv'
  write_records_csv(records, path)
  print(format_paper_comparison(records, reproduction_paper_cells(name)))
  print_stderr(f'report: {write_experiment_report(path)}')


def run_miniatures(args, only: str = ''):
  """Run all miniature experiments, or the one of a table, and write the page of results.

  All experiments are run with the first seed, then with the second, and so on.
  """
  from absl import logging

  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.mini import MINI_EXPERIMENTS, SWEEP, check_sources, estimate_runs

  effort = read_mini_effort(args)
  chosen = [SWEEP, find_mini_experiment(only)] if only else [*MINI_EXPERIMENTS]
  if args.dry_run:
    print('\n'.join(estimate_runs(chosen, effort)))
    return
  check_sources(effort)
  logging.set_verbosity(logging.WARNING)  # Hide the progress messages of libraries.
  enable_compilation_cache()
  for seed in effort.seeds:
    for name in chosen:
      effort = run_miniature(name, effort, seed, root=Path(args.root), out=mini_directory(args))


def run_miniature(name: str, effort, seed: int, *, root: Path, out: Path):
  """Run an experiment with a seed, write its CSV and the page, and return the effort.

  After the sweep, the effort has its learning rates.
  """
  from vit_jax.paper.mini import SWEEP, choose_rates, select_mini_runs
  from vit_jax.paper.results_page import PAGE_SECTIONS, write_results_page
  from vit_jax.paper.runner import read_records_csv, update_csv

  print_stderr(f'{name}, seed {seed}: {PAGE_SECTIONS[name].title}')
  path = out / f'mini_{name}.csv'
  runs = select_mini_runs(name, effort, effort.seeds)
  update_csv(path, runs, select_mini_runs(name, effort, (seed,)), root)
  if name == SWEEP:
    effort = dataclasses.replace(effort, rates=choose_rates(read_records_csv(path)))
  print_stderr(f'report: {write_experiment_report(path)}')
  print_stderr(f'see {write_results_page(out, effort)}')
  return effort


def read_mini_effort(args):
  """Return the amount of training and the data that the arguments state."""
  from vit_jax.paper.mini import MiniEffort

  sources = {'cifar10': args.cifar10, 'fashion_mnist': args.fashion_mnist, 'flowers': args.photos}
  return MiniEffort(
    step_factor=args.effort,
    max_runs=args.runs,
    seeds=tuple(range(args.seeds)),
    sources={name: source for name, source in sources.items() if source},
  )


def mini_directory(args) -> Path:
  """Return --out. By default, a test with less effort or fewer runs does not write to results."""
  is_complete = args.effort == 1 and not args.runs
  return Path(args.out or ('results' if is_complete else f'{args.root}/results'))


def find_mini_experiment(name: str) -> str:
  """Return the miniature experiment of a table or figure.

  Raises UserError if it has none.
  """
  from vit_jax.paper.reproductions import find_reproduction, format_reproduction_title

  item = find_reproduction(name)
  if not item.mini_experiment:
    command = item.command or f'tables {name} --scale=full'
    raise UserError(f'{format_reproduction_title(name)} has no miniature; it is made by {command}')
  return item.mini_experiment


def run_from_released(args, name: str):
  """Fine-tune released checkpoints, and compare with the paper and its authors' code."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.released_finetuning import format_released_comparison, released_finetune_runs
  from vit_jax.paper.runner import execute_runs, write_records_csv
  from vit_jax.paper.runs import format_run_command

  if name not in ('5', 'table5'):
    raise UserError(
      f'tables {name} --from_released: only Table 5 can be made from released checkpoints'
    )
  read_settings = functools.partial(read_changed_settings, args.settings)
  runs = released_finetune_runs(args.only, read_settings, tuple(range(args.seeds)))
  if args.dry_run:
    print('\n'.join(format_run_command(run, Path(args.root)) for run in runs))
    return
  enable_compilation_cache()
  records = execute_runs(runs, Path(args.root))
  write_records_csv(records, Path(args.out or 'results') / '5_from_released.csv')
  print(format_released_comparison(records))


def read_changed_settings(flags: list[str], recipe: str) -> dict[str, object]:
  """Return the settings that --config.FIELD=VALUE flags change in a recipe."""
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.settings.fields import flatten_config

  default = flatten_config(parse_config_flags([], default=recipe))
  changed = flatten_config(parse_config_flags(flags, default=recipe))
  return {name: value for name, value in changed.items() if value != default[name]}


def print_speeds(args):
  """Measure Figure 12 on the devices of this machine."""
  from vit_jax.paper.inference_speed import (
    MAX_BATCH_PER_DEVICE,
    figure_12_models,
    format_speeds,
    measure_speeds,
  )

  speeds = measure_speeds(
    args.only or figure_12_models(),
    args.sizes,
    dtype=args.dtype,
    max_batch=args.largest or MAX_BATCH_PER_DEVICE,
  )
  for line in format_speeds(speeds):
    print(line, flush=True)


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('tables', help=tables.__doc__, description=tables.__doc__)
  command.set_defaults(function=tables, takes_settings=True)
  add = command.add_argument
  add(
    'name',
    nargs='?',
    help='table (2 to 9), figure (fig2 to fig14) or selfsupervision; augreg, plain_vit or sam: the '
    'table of a later paper; mini: all miniatures; without a name: the list',
  )
  add('--list', action='store_true', help='list every table and figure')
  add(
    '--scale', choices=('full', 'mini'), default='full', help='scale of the runs; by default full'
  )
  add('--dry_run', action='store_true', help='print the commands, their cost and data; run nothing')
  add('--standin', action='store_true', help='use ImageNet-21k instead of JFT-300M')
  add('--from_released', action='store_true', help='fine-tune checkpoints that Google released')
  _add_run_arguments(command)
  _add_cost_arguments(command)
  _add_speed_arguments(command)


def _add_run_arguments(command: argparse.ArgumentParser):
  """Add the arguments that select runs and directories."""
  add = command.add_argument
  only = '--from_released: VARIANT,DATA such as B/16,cifar10; fig12: models such as B/16'
  add('--only', nargs='+', default=[], metavar='NAME', help=only)
  add(
    '--root',
    default='runs/tables',
    metavar='DIR',
    help='directory of the runs; existing runs resume',
  )
  out = 'directory of the CSV, plots and page; by default results, and for miniatures with another '
  out += '--effort or with --runs the folder results of --root'
  add('--out', default='', metavar='DIR', help=out)
  effort = 'miniatures: factor for the number of steps, at most 20; by default 1, which is about 8 '
  effort += 'hours of two CPU cores. Less only tests that everything runs'
  add('--effort', type=parse_effort, default=1.0, metavar='FACTOR', help=effort)
  runs = 'miniatures: number of runs of each experiment and seed; by default all'
  add('--runs', type=non_negative_int, default=0, metavar='N', help=runs)
  add('--seeds', type=positive_int, default=3, metavar='N', help='number of seeds; by default 3')
  cifar10 = 'miniatures: CIFAR-10; by default tfds:cifar10'
  add('--cifar10', default='', metavar='SOURCE', help=cifar10)
  fashion_mnist = 'miniatures: Fashion-MNIST; by default the files of dataset-fashion-mnist'
  add('--fashion_mnist', default='', metavar='SOURCE', help=fashion_mnist)
  photos = 'miniatures: photographs to fine-tune on'
  add('--photos', default='', metavar='folder:DIR', help=photos)


def _add_cost_arguments(command: argparse.ArgumentParser):
  """Add the arguments of the cost estimate."""
  add = command.add_argument
  chips = ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')
  add('--chip', default='v5e', choices=chips, help='TPU generation whose hours to estimate')
  mfu = 'model FLOPs utilization in percent of the peak; by default 40'
  add('--mfu', type=positive_int, metavar='PERCENT', help=mfu)
  add('--plan', metavar='FILE', help='read the utilization from a file of `plan --json FILE`')


def _add_speed_arguments(command: argparse.ArgumentParser):
  """Add the arguments of fig12."""
  add = command.add_argument
  sizes = [64, 128, 224, 384, 512]
  add(
    '--sizes',
    type=positive_int,
    nargs='+',
    default=sizes,
    metavar='PIXELS',
    help='fig12: image sizes',
  )
  largest = 'fig12: largest batch on each device; by default 1024'
  add('--largest', type=positive_int, metavar='IMAGES', help=largest)
  dtypes = ('float32', 'bfloat16')
  add('--dtype', default='bfloat16', choices=dtypes, help='fig12: type of the computation')


def parse_effort(text: str) -> float:
  """Parse a number above 0 and at most 20."""
  try:
    value = float(text)
  except ValueError:
    value = float('nan')
  if not 0 < value <= 20:
    raise argparse.ArgumentTypeError(f'{text!r}: expected a number above 0 and at most 20')
  return value
