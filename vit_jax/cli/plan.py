"""plan: does a run fit a TPU slice that is not here, and how long would it take?"""

import dataclasses
import json
import os

from vit_jax.cli.arguments import positive_int
from vit_jax.cli.jobs import parse_config_flags
from vit_jax.cli.results import (
  STDOUT,
  check_output_paths,
  format_table,
  report_elapsed_time,
  write_output,
)
from vit_jax.runtime.cluster import print_stderr

# No TPU is here, no metadata server to ask for one, and libtpu need not say so at length.
QUIET = {
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true', 'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3',
}  # fmt: skip


def plan(args):
  """Compiles a run's train step for a TPU slice that is not here: does it fit, and how long would it take? Exit code 1: no."""
  check_output_paths(json=args.json, hlo=args.hlo)
  os.environ |= QUIET  # Before jax is imported.
  from vit_jax.config import with_settings
  from vit_jax.tpu.plan import describe, side_by_side
  from vit_jax.tpu.topologies import topology

  where, config = topology(args.topology, args.slices), parse_config_flags(args.settings)
  others = {what: other(what, args) for what in args.compare or ()}
  found, hlo = compiled(config, where)
  if args.json != STDOUT:
    print('\n'.join(describe(config, found)))
  write_output(as_json(found), args.json)
  write_output(hlo, args.hlo)
  if others:
    plans = {args.topology: found} | {what: compiled(*pair)[0] for what, pair in others.items()}
    print(format_table(side_by_side(plans)), end='')
  if not found.fits and (remedy := first_that_fits(config, where)):
    settings, made = remedy
    print(
      'it fits with '
      + ' '.join(f'--config.{name}={value}' for name, value in settings.items())
      + ':'
    )
    print('\n'.join(describe(with_settings(config, settings), made)))
  raise SystemExit(0 if found.fits else 1)


def compiled(config, where):
  """The plan and the program, with a line while the compiler works."""
  from vit_jax.tpu.plan import plan

  with report_elapsed_time(
    f'compiling {config.model.variant} for {where.chips} chips of {where.name}'
  ):
    return plan(config, where)


def first_that_fits(config, where):
  """(the settings, the plan) of the first remedy with which the run fits, or None."""
  from vit_jax.config import with_settings
  from vit_jax.tpu.plan import remedies

  for settings in remedies(config, where):
    print_stderr(f'it does not fit; trying {settings}')
    found, _ = compiled(with_settings(config, settings), where)
    if found.fits:
      return settings, found
  return None


def other(what: str, args):
  """(config, topology) of what to compare with: another config FILE:ARGUMENT, or another slice."""
  from vit_jax.tpu.topologies import topology

  if '.py' not in what:
    return parse_config_flags(args.settings), topology(what, args.slices)
  rest = [arg for i, arg in enumerate(args.settings) if not is_config(args.settings, i)]
  return parse_config_flags([f'--config={what}', *rest]), topology(args.topology, args.slices)


def is_config(settings: list[str], i: int) -> bool:
  """Whether the argument at i is --config=FILE, or one of the two of --config FILE."""
  return (
    settings[i].startswith('--config=')
    or settings[i] == '--config'
    or (i > 0 and settings[i - 1] == '--config')
  )


def as_json(found) -> str:
  """All of a plan as one object."""
  facts = dataclasses.asdict(found) | {'seconds_per_step': found.seconds_per_step, 'mfu': found.mfu}
  return json.dumps(facts, indent=1) + '\n'


def add(commands):
  """The arguments. Those of the config go on to the parser that the main jobs have."""
  more = 'The recipe: --config FILE:ARGUMENT and any --config.FIELD=VALUE, as run_pretrain.py takes them.'
  command = commands.add_parser('plan', help=plan.__doc__, description=plan.__doc__, epilog=more)
  command.set_defaults(function=plan, takes_settings=True)
  command.add_argument('--topology', required=True, metavar='SLICE', help='such as v5e:4x4')
  command.add_argument(
    '--slices', type=positive_int, default=1, help='of that kind, over the slower network'
  )
  command.add_argument(
    '--compare',
    action='append',
    metavar='WHAT',
    help='another slice, or another config, side by side',
  )
  command.add_argument(
    '--json', metavar='FILE', help='all of it as one object; - for stdout, in place of the text'
  )
  command.add_argument('--hlo', metavar='FILE', help='the compiled program')
