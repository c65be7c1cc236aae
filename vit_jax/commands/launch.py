"""launch: the same command on every host of a machine that has several, or of one that pretends to."""

import sys

from vit_jax.commands.arguments import positive, whole


def launch(args):
  """Runs a command on several hosts that train together. Exit code: the first of a host that is not 0."""
  from vit_jax.cloud.local import run_hosts

  raise SystemExit(run_hosts(args.job, hosts=args.hosts, devices=args.devices_per_host, out=sys.stdout))


def add(commands):
  """The arguments; what comes after -- is the command."""
  command = commands.add_parser('launch', help=launch.__doc__, description=launch.__doc__)
  command.set_defaults(function=launch)
  command.add_argument('--backend', choices=('local',), default='local', help='where: processes on this machine')
  command.add_argument('--hosts', type=positive, default=2, help='how many')
  devices = 'simulated CPU devices of each; 0: what JAX finds'
  command.add_argument('--devices_per_host', type=whole, default=0, metavar='N', help=devices)
  command.add_argument('job', nargs='+', metavar='-- SCRIPT', help='run_pretrain.py and its flags, or -m MODULE')
