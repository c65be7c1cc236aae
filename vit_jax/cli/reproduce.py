"""The command `reproduce`: published results beside those of our runs."""

import argparse
from pathlib import Path

from vit_jax.errors import UserError


def reproduce(args: argparse.Namespace):
  """List results that others published and the state of our runs, or run one.

  A run is resumed by the same command. The exit code is 1 if a result is missed.
  """
  from vit_jax.cli.jobs import enable_compilation_cache

  if args.name:
    enable_compilation_cache()
    run_result(args)
  else:
    print_statuses(args)


def run_result(args: argparse.Namespace):
  """Run one published result, record it and print both numbers."""
  from vit_jax.paper.published_results import PUBLISHED_RESULTS
  from vit_jax.paper.reproduce import format_verdict, points_missed, reproduce

  record = reproduce(args.name, root=Path(args.root), out=Path(args.out))
  result = PUBLISHED_RESULTS[args.name]
  verdict = format_verdict(result, record)
  published = f'published {result.target:g} % on {result.data}'
  print(f'{args.name}: {verdict} (seeds {record.seeds}, {record.data}), {published}')
  if points_missed(result, record) > 0:
    raise SystemExit(1)


def print_statuses(args: argparse.Namespace):
  """Print a paragraph for each published result."""
  from vit_jax.paper.reproduce import list_statuses

  rows = list_statuses(Path(args.out))
  shown = [row for row in rows if args.filter in row[2]]
  if not shown:
    raise UserError(f'reproduce --filter {args.filter}: no result has such a state')
  for name, result, status in shown:
    print(f'{name}: {result.title}')
    print(f'  published {result.target:g} % on {result.data} ({result.source})')
    if result.differences:
      print(f'  ours has {result.differences}')
    print(f'  {status}')
  matched = sum(row[2].startswith('matched') for row in rows)
  stale = sum(row[2].startswith('stale') for row in rows)
  print(f'{len(rows)} results, {matched} matched, {stale} stale')


def add(commands):
  """Add the command and its arguments."""
  help = reproduce.__doc__.partition('\n')[0]
  command = commands.add_parser('reproduce', help=help, description=reproduce.__doc__)
  command.set_defaults(function=reproduce)
  add = command.add_argument
  add('name', nargs='?', help='the result to run; without it, all are listed')
  add(
    '--filter', default='', metavar='TEXT', help='list results whose state contains TEXT: matched'
  )
  add('--root', default='runs/reproduce', metavar='DIR', help='directory of the runs')
  add('--out', default='results', metavar='DIR', help='directory of reproduced.csv')
