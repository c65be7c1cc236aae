"""doctor: is every host fit for a run?"""

from pathlib import Path

from vit_jax.cli.arguments import add_host_flags, parse_host_flags, positive_int
from vit_jax.cli.jobs import join_cluster
from vit_jax.runtime.cluster import exit_on_error


def doctor(args):
  """Looks at every host: versions, devices, a sum over all of them, workdir, data, disk, clocks. Exit code 1: not fit."""
  processes = join_cluster(**parse_host_flags(args))
  import jax

  from vit_jax.launch.doctor import examine

  with exit_on_error(processes):
    findings = examine(args.workdir, args.data, devices=args.devices)
    if jax.process_index() == 0:
      print('\n'.join(map(str, findings)), flush=True)
  raise SystemExit(0 if all(finding.ok for finding in findings) else 1)


def add(commands):
  """The arguments."""
  more = 'On several hosts: `launch … -- -m vit_jax doctor`, or the same command on each of them.'
  command = commands.add_parser(
    'doctor', help=doctor.__doc__, description=doctor.__doc__, epilog=more
  )
  command.set_defaults(function=doctor)
  option = command.add_argument
  option(
    '--workdir', type=Path, metavar='DIR', help='of the run: every host should write and read it'
  )
  option('--data', type=Path, metavar='DIR', help='that every host should find')
  option('--devices', type=positive_int, metavar='N', help='that all hosts together should have')
  add_host_flags(command)
