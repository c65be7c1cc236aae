"""plan: does a run fit a TPU slice that is not here, and how long would it take?"""

import dataclasses
import json
import os

from vit_jax.commands.arguments import positive
from vit_jax.commands.results import STDOUT, refuse_places, say, write
from vit_jax.entry import read_config

# No TPU is here, no metadata server to ask for one, and libtpu need not say so at length.
QUIET = {
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true', 'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3',
}  # fmt: skip


def plan(args):
  """Compiles a run's train step for a TPU slice that is not here: does it fit, and how long would it take? Exit code 1: no."""
  refuse_places(json=args.json, hlo=args.hlo)
  os.environ |= QUIET  # Before jax is imported.
  from vit_jax.cloud.plan import describe, plan
  from vit_jax.cloud.topologies import topology

  where, config = topology(args.topology, args.slices), read_config(args.settings)
  say(f'compiling for {where.chips} chips of {where.name} …')
  found, hlo = plan(config, where)
  if args.json != STDOUT:
    print('\n'.join(describe(config, found)))
  facts = dataclasses.asdict(found) | {'seconds_per_step': found.seconds_per_step, 'mfu': found.mfu}
  write(json.dumps(facts, indent=1) + '\n', args.json)
  write(hlo, args.hlo)
  raise SystemExit(0 if found.fits else 1)


def add(commands):
  """The arguments. Those of the config go on to the parser that the main jobs have."""
  more = 'The recipe: --config FILE:ARGUMENT and any --config.FIELD=VALUE, as run_pretrain.py takes them.'
  command = commands.add_parser('plan', help=plan.__doc__, description=plan.__doc__, epilog=more)
  command.set_defaults(function=plan, takes_settings=True)
  command.add_argument('--topology', required=True, metavar='SLICE', help='such as v5e:4x4')
  command.add_argument('--slices', type=positive, default=1, help='of that kind, over the slower network')
  command.add_argument('--json', metavar='FILE', help='all of it as one object; - for stdout, in place of the text')
  command.add_argument('--hlo', metavar='FILE', help='the compiled program')
