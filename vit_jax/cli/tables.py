"""tables: any table or figure of the paper, at full scale or in miniature, with the paper's numbers beside ours."""

import argparse
import functools
from pathlib import Path

from vit_jax.cli.arguments import positive, whole
from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr


def tables(args):
  """Lists every table and figure of the paper with what makes it; or makes one, in miniature (`mini`: all) or at full scale."""
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
  """One paragraph each: the rows of a table would be too wide for any screen."""
  from vit_jax.paper.reproductions import list_reproductions

  for what, title, command, needs, status in list_reproductions():
    print(f'{what:9} {title}\n{"":9} {command}\n{"":9} needs {needs}\n{"":9} {status}')


def print_dry_run(args, name: str):
  """What would be done."""
  from vit_jax.paper.reproductions import format_dry_run

  mfu = read_mfu(args)
  for line in format_dry_run(
    name, root=Path(args.root), standin=args.standin, chip=args.chip, mfu=mfu
  ):
    print(line)


def read_mfu(args) -> float:
  """What --mfu says, or the plan of --plan found."""
  import json

  from vit_jax.tpu.cost import MFU

  if not args.plan:
    return args.mfu / 100 if args.mfu else MFU
  try:
    return json.loads(Path(args.plan).read_text())['mfu']
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'--plan {args.plan}: expected what `plan --json FILE` writes, got {error!r}'
    ) from None


def run_full_scale(args, name: str):
  """Does the runs here, one after another."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.full_scale import replace_jft
  from vit_jax.paper.reproductions import (
    find_reproduction,
    format_reproduction_title,
    reproduction_paper_cells,
  )
  from vit_jax.paper.results_page import format_paper_comparison
  from vit_jax.paper.runner import execute_runs, write_records_csv

  each = find_reproduction(name)
  if not each.runs:
    raise UserError(f'{format_reproduction_title(name)} is made by {each.command}')
  enable_compilation_cache()
  runs = [replace_jft(run) if args.standin else run for run in each.runs()]
  records = execute_runs(runs, Path(args.root))
  write_records_csv(records, Path(args.out) / f'{name}.csv')
  print(format_paper_comparison(records, reproduction_paper_cells(name)))


def run_miniatures(args, only: str = ''):
  """All experiments of mini.py, or the one that a table has, and the page about them."""
  from absl import logging

  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.mini import MINI_EXPERIMENTS, MiniEffort, check_photos, select_mini_runs
  from vit_jax.paper.reproductions import find_reproduction, format_reproduction_title
  from vit_jax.paper.results_page import write_results_page
  from vit_jax.paper.runner import execute_runs, write_records_csv

  effort = MiniEffort(
    steps=args.effort, runs=args.runs, seeds=tuple(range(args.seeds)), photos=args.photos
  )
  check_photos(effort)
  if only and not find_reproduction(only).mini:
    raise UserError(
      f'{format_reproduction_title(only)} has no miniature; it is made by {find_reproduction(only).command or f"tables {only} --scale=full"}'
    )
  wanted = [find_reproduction(only).mini] if only else [*MINI_EXPERIMENTS]
  logging.set_verbosity(logging.WARNING)
  enable_compilation_cache()
  for name in wanted:
    print_stderr(f'{name}: {(MINI_EXPERIMENTS[name].__doc__ or "").splitlines()[0]}')
    write_records_csv(
      execute_runs(select_mini_runs(name, effort), Path(args.root)),
      Path(args.out) / f'mini_{name}.csv',
    )
    print_stderr(f'see {write_results_page(Path(args.out), effort)}')


def run_from_released(args, name: str):
  """Released checkpoints fine-tuned on data that is here: the paper's numbers, those of its authors' code, and ours."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.released_finetuning import format_released_comparison, released_finetune_runs
  from vit_jax.paper.runner import execute_runs, write_records_csv
  from vit_jax.paper.runs import format_run_command

  if name not in ('5', 'table5'):
    raise UserError(
      f'tables {name} --from_released: Table 5 alone is about checkpoints that were released'
    )
  runs = released_finetune_runs(
    args.only, functools.partial(read_changed_settings, args.settings), tuple(range(args.seeds))
  )
  if args.dry_run:
    print('\n'.join(format_run_command(run, Path(args.root)) for run in runs))
    return
  enable_compilation_cache()
  records = execute_runs(runs, Path(args.root))
  write_records_csv(records, Path(args.out) / '5_from_released.csv')
  print(format_released_comparison(records))


def read_changed_settings(settings: list[str], config: str) -> dict[str, object]:
  """What --config.FIELD=VALUE flags make different from FILE:ARGUMENT."""
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.config import flatten_config

  plain, said = (
    flatten_config(parse_config_flags([f'--config={config}', *more])) for more in ([], settings)
  )
  return {name: value for name, value in said.items() if value != plain[name]}


def print_speeds(args):
  """Figure 12, on the devices that are here."""
  from vit_jax.paper.inference_speed import (
    MAX_BATCH_PER_DEVICE,
    figure_12_models,
    format_speeds,
    measure_speeds,
  )

  chosen = args.only or figure_12_models()
  for line in format_speeds(
    measure_speeds(
      chosen, args.sizes, dtype=args.dtype, largest=args.largest or MAX_BATCH_PER_DEVICE
    )
  ):
    print(line, flush=True)


def add(commands):
  """The arguments."""
  command = commands.add_parser('tables', help=tables.__doc__, description=tables.__doc__)
  command.set_defaults(function=tables, takes_settings=True)
  command.add_argument(
    'name',
    nargs='?',
    help='2 to 9, fig2 to fig14, selfsupervision; mini for all miniatures; by default the list',
  )
  command.add_argument('--list', action='store_true', help='every table and figure')
  command.add_argument('--scale', choices=('full', 'mini'), default='full', help='by default full')
  command.add_argument(
    '--dry_run', action='store_true', help='print the commands, their cost and the data they need'
  )
  command.add_argument(
    '--standin', action='store_true', help='ImageNet-21k in the place of JFT-300M'
  )
  command.add_argument(
    '--from_released', action='store_true', help='fine-tune checkpoints that Google released'
  )
  command.add_argument(
    '--only',
    nargs='+',
    default=[],
    metavar='WHAT',
    help='--from_released: B/16,cifar10; fig12: B/16',
  )
  command.add_argument(
    '--root', default='runs/tables', metavar='DIR', help='where runs are kept, and taken up again'
  )
  command.add_argument(
    '--out', default='results', metavar='DIR', help='where CSV, plots and the page go'
  )
  command.add_argument(
    '--chip',
    default='v5e',
    choices=('v4', 'v5e', 'v5p', 'v6e', 'tpu7x'),
    help='whose hours are told',
  )
  command.add_argument(
    '--mfu', type=positive, metavar='%', help='the share of its peak that is reached; by default 40'
  )
  command.add_argument('--plan', metavar='FILE', help='take it from what `plan --json FILE` wrote')
  command.add_argument(
    '--effort',
    type=parse_effort,
    default=1.0,
    help='miniatures: a factor on all steps; by default 1',
  )
  command.add_argument(
    '--runs',
    type=whole,
    default=0,
    help='miniatures: of each experiment the first so many; by default all',
  )
  command.add_argument('--seeds', type=positive, default=3, help='miniatures: by default 3')
  command.add_argument(
    '--sizes', type=positive, nargs='+', default=[64, 128, 224, 384, 512], help='fig12: pixels'
  )
  command.add_argument(
    '--largest', type=positive, help='fig12: images at once, for each device; by default 1024'
  )
  command.add_argument(
    '--dtype', default='bfloat16', choices=('float32', 'bfloat16'), help='fig12: of the computation'
  )
  command.add_argument(
    '--photos', default='', metavar='folder:DIR', help='miniatures: photographs to transfer to'
  )


def parse_effort(text: str) -> float:
  """A number above 0 and up to 10."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value <= 10:
    raise argparse.ArgumentTypeError(f'{text!r} is no number above 0')
  return value
