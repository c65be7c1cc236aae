"""doctor: check whether every host is fit for a run."""

from pathlib import Path

from vit_jax.cli.arguments import add_host_flags, parse_host_flags, positive_int
from vit_jax.cli.jobs import join_cluster
from vit_jax.runtime.cluster import exit_on_error


def doctor(args):
  """Check every host: versions, devices, an all-reduce, work directory, data, disk, clocks.

  Exits with 1 if a check fails.
  """
  processes = join_cluster(**parse_host_flags(args))
  import jax

  from vit_jax.launch.doctor import diagnose_hosts

  with exit_on_error(processes):
    findings = diagnose_hosts(args.workdir, args.data, devices=args.devices)
    if jax.process_index() == 0:
      print('\n'.join(map(str, findings)), flush=True)
  raise SystemExit(0 if all(finding.ok for finding in findings) else 1)


def add(commands):
  """Add the arguments of `doctor`."""
  more = 'On several hosts: `launch … -- -m vit_jax doctor`, or the same command on each host.'
  command = commands.add_parser(
    'doctor', help=doctor.__doc__, description=doctor.__doc__, epilog=more
  )
  command.set_defaults(function=doctor)
  option = command.add_argument
  option(
    '--workdir', type=Path, metavar='DIR', help='work directory that every host must read and write'
  )
  option('--data', type=Path, metavar='DIR', help='data directory that every host must read')
  option(
    '--devices',
    type=positive_int,
    metavar='N',
    help='expected number of devices over all hosts',
  )
  add_host_flags(command)
