"""launch: run a command on every host of a pod, or in several local processes."""

import argparse
import re
import sys
import time
from pathlib import Path

from vit_jax.cli.arguments import Parser, non_negative_int, positive_float, positive_int
from vit_jax.cli.jobs import default_workdir, parse_config_flags
from vit_jax.config_checks import validate
from vit_jax.errors import UserError, did_you_mean, mask_credentials
from vit_jax.launch.environment import new_run_token, parse_env, secret_part
from vit_jax.launch.job import Job
from vit_jax.launch.manage import JOB_VERBS, run_verb, watch_until_interrupted
from vit_jax.launch.shell import quote_word
from vit_jax.launch.watch import Babysitter, PollSchedule, first_line, run_cloud_command
from vit_jax.runtime.screen import ignore_lost_stdout, print_stderr

DEFAULT_RECIPES = {
  'run_pretrain.py': 'configs/quickstart.py',
  'run_finetune.py': 'configs/quickstart_finetune.py',
}  # The defaults of the two scripts.


def launch(args):
  """Run a command on every host of a TPU pod, or in several processes on this machine.

  Exits with the exit code of the run.
  """
  ignore_lost_stdout()  # Unread output would block a host for ever.
  first, *rest = args.what or ['']
  if first in JOB_VERBS:
    raise SystemExit(run_verb(first, parse_verb_arguments(first, rest)))
  if first != '--' or not rest:
    got = f'got {first!r}.{did_you_mean(first, JOB_VERBS)}' if first else 'got nothing'
    raise UserError(
      'expected -- and the command, such as -- run_pretrain.py --config=…, or one of '
      f'{", ".join(JOB_VERBS)}; {got}'
    )
  env = dict(map(parse_env, args.env))
  if any('\0' in text for text in [*rest, *env.values()]):
    raise UserError('a NUL character in the command or in a value of --env: no process can take it')
  raise SystemExit(
    launch_local(args, rest, env) if args.backend == 'local' else launch_on_cloud(args, rest, env)
  )


def parse_verb_arguments(verb: str, rest: list[str]) -> argparse.Namespace:
  """Parse the arguments of a verb: NAME, and --yes for delete."""
  parser = Parser(prog=f'vit-jax launch {verb}', description=JOB_VERBS[verb])
  parser.add_argument('name', help='name of the job')
  if verb == 'delete':
    parser.add_argument('--yes', action='store_true', help='delete without asking')
  return parser.parse_args(rest)


def launch_local(args, command: list[str], env: dict[str, str]) -> int:
  """Launch with --backend=local."""
  from vit_jax.launch.dry_run import format_local_command
  from vit_jax.launch.local import host_environment, run_hosts

  if is_training_command(command):
    if args.devices_per_host:
      check_divides(
        parse_command_config(command), devices=args.hosts * args.devices_per_host, hosts=args.hosts
      )
    if not has_workdir(command):
      command = [*command, f'--workdir={args.workdir or default_workdir(config_name(command))}']
  if args.dry_run:
    for i in range(args.hosts):
      own = host_environment('localhost:PORT', args.hosts, i, devices=args.devices_per_host)
      print(mask_credentials(format_local_command(own, env, command)))
    print_masked_names(env)
    return 0
  return run_hosts(
    command, hosts=args.hosts, devices=args.devices_per_host, out=sys.stdout, env=env
  )


def has_workdir(command: list[str]) -> bool:
  """Return whether a command has the flag --workdir."""
  return any(re.match(r'--?workdir\b', arg) for arg in command)


def launch_on_cloud(args, command: list[str], env: dict[str, str]) -> int:
  """Launch with one of the cloud backends."""
  from vit_jax.launch import bundle
  from vit_jax.launch.dry_run import format_dry_run, upload_commands
  from vit_jax.launch.job import check_job, save_job

  root = bundle.checkout_root(Path.cwd())
  revision, left_out = bundle.resolve_commit(root, allow_dirty=args.allow_dirty)
  if left_out:
    print_stderr(f'not launched, since it is not in commit {revision}: {left_out}')
  job = make_job(args, command, env, revision)
  check_job(job)
  check_job_fits(args, job, command)
  bundle.make_start_files(job)  # Raises UserError if they are too long.
  if args.dry_run:
    print(mask_credentials(format_dry_run(job, bundle.archive_command(root, revision, 'FILES'))))
    print_masked_names(secret_part(job.env))
    return 0
  with bundle.launch_folder() as files:
    bundle.write_start_files(job, files)
    (Path(files) / 'pins.txt').write_text(bundle.format_pins(root), encoding='utf-8')
    for step in [bundle.archive_command(root, revision, files), *upload_commands(job, files)]:
      if (done := run_cloud_command(step)).returncode:
        raise UserError(f'{" ".join(step[:3])} …: {first_line(done.stderr)}')
    save_job(job)
    babysitter = Babysitter(job, files, schedule=PollSchedule(poll=args.poll))
    if args.detach:
      babysitter.create()
      return 0
    return watch_until_interrupted(babysitter, create=True)


def print_masked_names(env: dict[str, str]):
  """Print how the commands of a dry run get the values that it does not show."""
  if env:
    print_stderr(
      f'values are not shown: before you run these commands, set and export {", ".join(env)}; in '
      'a start.sh, write the value in place of "${NAME?}"'
    )


def make_job(args, command: list[str], env: dict[str, str], revision: str):
  """Return the job that the flags describe. Raises UserError if they are wrong or incomplete."""
  from vit_jax.launch.job import WORKDIR
  from vit_jax.tpu.accelerators import parse_accelerator

  if not args.tpu:
    raise UserError(f'--backend={args.backend} needs --tpu, such as --tpu=v5litepod-16')
  slices = parse_accelerator(args.tpu, args.slices)
  if not slices.kind.image and args.backend != 'gke':
    raise UserError(f'--tpu={slices.name} is only available on GKE: --backend=gke')
  if args.slices > 1 and args.backend == 'tpu-vm':
    raise UserError('--backend=tpu-vm creates one slice; use --backend=queued for several')
  if has_workdir(command):
    raise UserError(f'--workdir=gs://BUCKET/PATH goes before the --: on the hosts it is {WORKDIR}')
  if is_training_command(command) or 'doctor' in command:
    command = [*command, f'--workdir={WORKDIR}']
  if 'LIBTPU_INIT_ARGS' in env:
    raise UserError('--env=LIBTPU_INIT_ARGS: use --libtpu_args=FLAGS, which `plan` reads too')
  flags = slices.libtpu_args if args.libtpu_args is None else args.libtpu_args
  return Job(
    name=args.name or default_name(command),
    backend=args.backend,
    tpu=slices.name,
    slices=args.slices,
    spot=args.spot,
    project=args.project or '',
    zone=args.zone or '',
    cluster=args.cluster or '',
    workdir=(args.workdir or '').rstrip('/'),
    data=(args.data or '').rstrip('/'),
    env={'LIBTPU_INIT_ARGS': flags} | new_run_token() | env,
    command=tuple(command),
    commit=revision,
    python=f'{sys.version_info.major}.{sys.version_info.minor}',
  )


def check_job_fits(args, job, command: list[str]):
  """Raise UserError if the run does not fit the slices. Print what `--no_plan` leaves unchecked."""
  from vit_jax.launch.memory_check import check_fits

  print_stderr(f'LIBTPU_INIT_ARGS={quote_word(job.env["LIBTPU_INIT_ARGS"])}')
  if not is_training_command(command):
    return
  slices = job.accelerator
  hosts = slices.topology.hosts if job.backend == 'gke' else slices.hosts * job.slices
  check_divides(
    parse_command_config(command), devices=slices.topology.devices, slices=job.slices, hosts=hosts
  )
  if args.no_plan:
    print_stderr('NOT PLANNED: it is unknown whether this fits, or how long it takes (--no_plan)')
  elif not args.dry_run:
    check_fits(
      parse_command_config(command),
      config_settings(command),
      slices,
      libtpu_args=job.env['LIBTPU_INIT_ARGS'],
    )


def check_divides(config, **where: int):
  """Raise UserError if mesh or batch sizes of the run do not divide over the devices."""
  from vit_jax.sharding.mesh import check_mesh_divides
  from vit_jax.training.program import sharded_batch_sizes

  config = validate(config)
  check_mesh_divides(config.mesh.fsdp, batches=sharded_batch_sizes(config), **where)


def is_training_command(command: list[str]) -> bool:
  """Return whether a command is one of the two training scripts."""
  return Path(command[0]).name in DEFAULT_RECIPES


def config_settings(command: list[str]) -> list[str]:
  """Return the config's flags, with the default --config if none is given."""
  settings = [arg for arg in command[1:] if not re.match(r'--?workdir\b', arg)]
  default = Path(command[0]).parent / DEFAULT_RECIPES[Path(command[0]).name]
  return (
    settings
    if any(re.match(r'--?config(=|$)', arg) for arg in settings)
    else [f'--config={default}', *settings]
  )


def parse_command_config(command: list[str]):
  """Return the config of a training command."""
  return parse_config_flags(config_settings(command))


def default_name(command: list[str]) -> str:
  """Return a job name from config and time: 'pretrain-b-16-imagenet21k-1124-1343'."""
  file, _, argument = config_name(command).partition(':')
  words = re.findall('[a-z0-9]+', f'{Path(file).stem} {argument}'.lower())
  name = '-'.join(words).lstrip('0123456789-')[:30].strip('-')
  return f'{name or "job"}-{time.strftime("%m%d-%H%M")}'


def config_name(command: list[str]) -> str:
  """Return 'configs/pretrain.py:B/16,imagenet21k'. For other commands return the last word."""
  if not is_training_command(command):
    return command[-1] if not command[-1].startswith('-') else 'job'
  settings = config_settings(command)
  for i, arg in enumerate(settings):
    if re.fullmatch(r'--?config', arg):
      return settings[i + 1]
    if match := re.fullmatch(r'--?config=(.*)', arg, flags=re.DOTALL):
      return match[1]
  return ''


def add(commands):
  """Add the arguments of `launch`. Python runs the words after -- on every host."""
  command = commands.add_parser(
    'launch',
    help=launch.__doc__,
    description=launch.__doc__,
    usage='vit-jax launch [options] -- run_pretrain.py --config=…\n       vit-jax launch {'
    + ','.join(JOB_VERBS)
    + '} NAME',
  )
  command.set_defaults(function=launch)
  command.add_argument(
    '--backend',
    choices=('local', 'tpu-vm', 'queued', 'gke'),
    default='local',
    help='where to run; local: processes on this machine',
  )
  add_cloud_options(command)
  add_local_options(command)
  command.add_argument(
    'what',
    nargs=argparse.REMAINDER,
    help='-- and the command, or one of ' + ', '.join(JOB_VERBS) + ' and a NAME',
  )


def add_cloud_options(command: argparse.ArgumentParser):
  """Add the options of the cloud backends."""
  option = command.add_argument
  option('--tpu', metavar='TYPE', help='TPU slice, such as v5litepod-256 or v5e:16x16')
  option('--slices', type=positive_int, default=1, help='number of slices')
  option(
    '--spot',
    action='store_true',
    help='use cheaper machines that may be preempted, and request them again',
  )
  option('--project', help="Google Cloud project; by default gcloud's current one")
  option('--zone', help='zone of the TPUs, such as us-west4-a')
  option('--cluster', help='GKE cluster created by xpk')
  option('--name', help='name of the job; by default made from config and time')
  option('--workdir', metavar='URL', help='run directory: gs://BUCKET/PATH; for local, a folder')
  option(
    '--data',
    metavar='URL',
    help='gs://BUCKET/PATH that is mounted at /mnt/data on every host; sets $TFDS_DATA_DIR',
  )
  option(
    '--env',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='set a variable in the environment of the command; NAME alone takes the value from this '
    'shell, so that it is not in the list of processes; values are not printed',
  )
  option(
    '--libtpu_args',
    metavar='FLAGS',
    help='LIBTPU_INIT_ARGS, instead of the default of the TPU',
  )
  option('--no_plan', action='store_true', help='do not check that the run fits into memory')
  option(
    '--allow_dirty',
    action='store_true',
    help='launch the commit, and leave out uncommitted changes',
  )
  option('--detach', action='store_true', help='return when the job is requested; do not watch it')
  option(
    '--poll',
    type=positive_float,
    default=30,
    metavar='SECONDS',
    help='time between two queries of the state',
  )


def add_local_options(command: argparse.ArgumentParser):
  """Add the options of the backend `local`, and those of all backends."""
  option = command.add_argument
  option('--hosts', type=positive_int, default=2, help='number of processes, for local')
  option(
    '--devices_per_host',
    type=non_negative_int,
    default=0,
    metavar='N',
    help='simulated CPU devices of each process, for local; 0: the devices that JAX finds',
  )
  option(
    '--dry_run',
    action='store_true',
    help='print every command and script, without the values of --env, and run nothing',
  )
