"""plan: does a run fit a TPU slice that this machine does not have, and how long does it take?"""

import dataclasses
import json
import os
import re

from vit_jax.cli.arguments import positive_int
from vit_jax.cli.jobs import parse_config_flags
from vit_jax.cli.results import (
  STDOUT,
  check_output_paths,
  format_table,
  report_elapsed_time,
  write_output,
)
from vit_jax.runtime.screen import print_stderr

# This machine has no TPU and no metadata server, and libtpu should not print warnings about it.
QUIET_TPU_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def plan(args):
  """Compile a run's train step for a TPU slice.

  Report whether it fits and how long it takes. Exits with 1 if it does not fit.
  """
  check_output_paths(json=args.json, hlo=args.hlo)
  os.environ |= QUIET_TPU_ENVIRONMENT  # Before jax is imported.
  from vit_jax.settings.fields import with_settings
  from vit_jax.tpu.plan import compare_plans, format_plan
  from vit_jax.tpu.topologies import parse_topology

  where, config = parse_topology(args.topology, args.slices), parse_config_flags(args.settings)
  others = {what: parse_comparison(what, args) for what in args.compare or ()}
  found, hlo = compile_plan(config, where)
  parts = find_breakdown(found, hlo) if args.breakdown else None
  if args.json != STDOUT:
    print('\n'.join(format_plan(config, found)))
    print_breakdown(parts)
  write_output(plan_to_json(found, parts), args.json)
  write_output(hlo, args.hlo)
  if others:
    plans = {args.topology: found} | {what: compile_plan(*pair)[0] for what, pair in others.items()}
    print(format_table(compare_plans(plans)), end='')
  if not found.fits and (remedy := find_remedy(config, where)):
    settings, made = remedy
    print(
      'it fits with '
      + ' '.join(f'--config.{name}={value}' for name, value in settings.items())
      + ':'
    )
    print('\n'.join(format_plan(with_settings(config, settings), made)))
  raise SystemExit(0 if found.fits else 1)


def compile_plan(config, where):
  """Return the plan and the program, with a line on the screen while the compiler works."""
  from vit_jax.tpu.plan import plan_run

  with report_elapsed_time(
    f'compiling {config.model.variant} for {where.chips} chips of {where.name}'
  ):
    return plan_run(config, where)


def find_remedy(config, where):
  """Return (settings, plan) of the first remedy with which the run fits, or None."""
  from vit_jax.settings.fields import with_settings
  from vit_jax.tpu.plan import memory_remedies

  for settings in memory_remedies(config, where):
    print_stderr(f'it does not fit; trying {settings}')
    found, _ = compile_plan(with_settings(config, settings), where)
    if found.fits:
      return settings, found
  return None


def parse_comparison(what: str, args):
  """Return (config, topology) of a comparison: another recipe, or another slice."""
  from vit_jax.recipes import is_recipe
  from vit_jax.tpu.topologies import parse_topology

  if not is_recipe(what):
    return parse_config_flags(args.settings), parse_topology(what, args.slices)
  rest = [arg for i, arg in enumerate(args.settings) if not is_config(args.settings, i)]
  return parse_config_flags([f'--config={what}', *rest]), parse_topology(args.topology, args.slices)


def is_config(settings: list[str], i: int) -> bool:
  """Return whether the argument at `i` belongs to --config=FILE or --config FILE."""
  return (
    re.match('--?config=', settings[i])
    or settings[i] in ('-config', '--config')
    or (i > 0 and settings[i - 1] in ('-config', '--config'))
  )


def find_breakdown(found, hlo: str):
  """Return the breakdown of a compiled plan, or None if it did not compile for lack of memory."""
  from vit_jax.tpu.breakdown import break_down

  return break_down(hlo, found.kernels, found.topology.generation) if hlo else None


def print_breakdown(parts):
  """Print the tables of a breakdown, if there is one."""
  from vit_jax.tpu.breakdown_table import breakdown_rows, format_mixed, operation_rows

  if parts is not None:
    lines = ''.join(f'{line}\n' for line in format_mixed(parts))
    tables = (
      format_table(breakdown_rows(parts)),
      lines,
      format_table(operation_rows(parts.operations)),
    )
    print('\n' + '\n'.join(tables), end='')


def plan_to_json(found, parts) -> str:
  """Return all of a plan, and its breakdown if there is one, as a JSON object."""
  from vit_jax.tpu.breakdown_table import breakdown_to_json

  facts = dataclasses.asdict(found) | {'seconds_per_step': found.seconds_per_step, 'mfu': found.mfu}
  if parts is not None:
    facts['breakdown'] = breakdown_to_json(parts)
  return json.dumps(facts, indent=1) + '\n'


def add(commands):
  """Add the arguments of `plan`. The flags of the config are parsed as for `train`."""
  more = '--config RECIPE:ARGUMENT and --config.FIELD=VALUE select the run, as for `train`.'
  command = commands.add_parser('plan', help=plan.__doc__, description=plan.__doc__, epilog=more)
  command.set_defaults(function=plan, takes_settings=True)
  command.add_argument(
    '--topology', required=True, metavar='SLICE', help='TPU slice, such as v5e:4x4'
  )
  command.add_argument(
    '--slices',
    type=positive_int,
    default=1,
    help='number of slices; the network between slices is slower',
  )
  command.add_argument(
    '--compare',
    action='append',
    metavar='WHAT',
    help='plan another slice or another recipe too, and print a table',
  )
  command.add_argument(
    '--json', metavar='FILE', help='write the plan as JSON; - prints it instead of the text'
  )
  command.add_argument(
    '--breakdown',
    action='store_true',
    help='show where the cycles go: by part of the model, and the most expensive operations',
  )
  command.add_argument('--hlo', metavar='FILE', help='write the compiled program as HLO text')
