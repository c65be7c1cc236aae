"""tables: any table or figure of the paper, at full scale or in miniature, with the paper's numbers beside ours."""

import argparse
import functools
from pathlib import Path

from vit_jax.cli.arguments import positive, whole
from vit_jax.cli.results import say
from vit_jax.errors import UserError


def tables(args):
  """Lists every table and figure of the paper with what makes it; or makes one, in miniature (`mini`: all) or at full scale."""
  name = args.name or 'list'
  if name == 'list' or args.list:
    listed()
  elif args.from_released:
    from_released(args, name)
  elif name == 'mini':
    miniature(args)
  elif args.scale == 'mini':
    miniature(args, only=name)
  elif args.dry_run:
    dry(args, name)
  elif name in ('fig12', 'figure12'):
    speeds(args)
  else:
    at_full_scale(args, name)


def listed():
  """One paragraph each: the rows of a table would be too wide for any screen."""
  from vit_jax.paper.tables import listing

  for what, title, command, needs, status in listing():
    print(f'{what:9} {title}\n{"":9} {command}\n{"":9} needs {needs}\n{"":9} {status}')


def dry(args, name: str):
  """What would be done."""
  from vit_jax.paper.tables import dry_run

  mfu = share_of_peak(args)
  for line in dry_run(name, root=Path(args.root), standin=args.standin, chip=args.chip, mfu=mfu):
    print(line)


def share_of_peak(args) -> float:
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


def at_full_scale(args, name: str):
  """Does the runs here, one after another."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.full import standin
  from vit_jax.paper.page import side_by_side
  from vit_jax.paper.runner import execute, write_records
  from vit_jax.paper.tables import item, paper_cells, title

  each = item(name)
  if not each.runs:
    raise UserError(f'{title(name)} is made by {each.command}')
  enable_compilation_cache()
  runs = [standin(run) if args.standin else run for run in each.runs()]
  records = execute(runs, Path(args.root))
  write_records(records, Path(args.out) / f'{name}.csv')
  print(side_by_side(records, paper_cells(name)))


def miniature(args, only: str = ''):
  """All experiments of mini.py, or the one that a table has, and the page about them."""
  from absl import logging

  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.mini import EXPERIMENTS, Effort, chosen, refuse_photos
  from vit_jax.paper.page import write_page
  from vit_jax.paper.runner import execute, write_records
  from vit_jax.paper.tables import item, title

  effort = Effort(
    steps=args.effort, runs=args.runs, seeds=tuple(range(args.seeds)), photos=args.photos
  )
  refuse_photos(effort)
  if only and not item(only).mini:
    raise UserError(
      f'{title(only)} has no miniature; it is made by {item(only).command or f"tables {only} --scale=full"}'
    )
  wanted = [item(only).mini] if only else [*EXPERIMENTS]
  logging.set_verbosity(logging.WARNING)
  enable_compilation_cache()
  for name in wanted:
    say(f'{name}: {(EXPERIMENTS[name].__doc__ or "").splitlines()[0]}')
    write_records(
      execute(chosen(name, effort), Path(args.root)), Path(args.out) / f'mini_{name}.csv'
    )
    say(f'see {write_page(Path(args.out), effort)}')


def from_released(args, name: str):
  """Released checkpoints fine-tuned on data that is here: the paper's numbers, those of its authors' code, and ours."""
  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.paper.released import compared, finetunings
  from vit_jax.paper.runner import execute, write_records
  from vit_jax.paper.runs import command

  if name not in ('5', 'table5'):
    raise UserError(
      f'tables {name} --from_released: Table 5 alone is about checkpoints that were released'
    )
  runs = finetunings(args.only, functools.partial(changed, args.settings), tuple(range(args.seeds)))
  if args.dry_run:
    print('\n'.join(command(run, Path(args.root)) for run in runs))
    return
  enable_compilation_cache()
  records = execute(runs, Path(args.root))
  write_records(records, Path(args.out) / '5_from_released.csv')
  print(compared(records))


def changed(settings: list[str], config: str) -> dict[str, object]:
  """What --config.FIELD=VALUE flags make different from FILE:ARGUMENT."""
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.config import flatten_config
  from vit_jax.paper.runs import ROOT

  plain, said = (
    flatten_config(parse_config_flags([f'--config={ROOT}/{config}', *more]))
    for more in ([], settings)
  )
  return {name: value for name, value in said.items() if value != plain[name]}


def speeds(args):
  """Figure 12, on the devices that are here."""
  from vit_jax.paper.speed import LARGEST, describe, measure, models

  chosen = args.only or models()
  for line in describe(
    measure(chosen, args.sizes, dtype=args.dtype, largest=args.largest or LARGEST)
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
    '--effort', type=share, default=1.0, help='miniatures: a factor on all steps; by default 1'
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


def share(text: str) -> float:
  """A number above 0 and up to 10."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value <= 10:
    raise argparse.ArgumentTypeError(f'{text!r} is no number above 0')
  return value
