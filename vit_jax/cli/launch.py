"""launch: one command on every host of a pod, or on several processes here; and what is done to it afterwards."""

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from vit_jax.cli.arguments import Parser, non_negative_int, positive_int
from vit_jax.cli.jobs import default_workdir, parse_config_flags
from vit_jax.config_checks import validate
from vit_jax.errors import UserError, did_you_mean
from vit_jax.launch.job import Job, forget, recall
from vit_jax.launch.logs import Followed
from vit_jax.launch.script import machine_script
from vit_jax.launch.states import GONE, trouble
from vit_jax.launch.watch import BACKENDS, Babysitter, Pace, call, explain
from vit_jax.runtime.cluster import print_stderr

DEFAULTS = {
  'run_pretrain.py': 'configs/quickstart.py',
  'run_finetune.py': 'configs/quickstart_finetune.py',
}  # As they have.
VERBS = {
  'status': 'What the cloud says of it.',
  'logs': "Follows its hosts' logs.",
  'watch': 'Goes on watching over it, and creates it again when its machines are taken away.',
  'stop': 'Ends the run and leaves the machines.',
  'delete': 'Removes the machines; the workdir stays. Asks first.',
}


def launch(args):
  """Runs a command on every host of a TPU pod, or on several processes of this machine. Exit code: that of the run."""
  first, *rest = args.what or ['']
  if first in VERBS:
    raise SystemExit(act(first, verb_arguments(first, rest)))
  if first != '--' or not rest:
    got = f'got {first!r}.{did_you_mean(first, VERBS)}' if first else 'got nothing'
    raise UserError(
      f'expected -- and the command, such as -- run_pretrain.py --config=…, or one of {", ".join(VERBS)}; {got}'
    )
  env = dict(map(key_and_value, args.env))
  raise SystemExit(here(args, rest, env) if args.backend == 'local' else there(args, rest, env))


def verb_arguments(verb: str, rest: list[str]) -> argparse.Namespace:
  """NAME, and --yes where something is lost."""
  parser = Parser(prog=f'vit-jax launch {verb}', description=VERBS[verb])
  parser.add_argument('name', help='of the job')
  if verb == 'delete':
    parser.add_argument('--yes', action='store_true', help='does not ask')
  return parser.parse_args(rest)


def here(args, command: list[str], env: dict[str, str]) -> int:
  """--backend=local."""
  from vit_jax.launch.local import environment, run_hosts

  if trains(command):
    if args.devices_per_host:
      refuse_undivided(
        config_of(command), devices=args.hosts * args.devices_per_host, hosts=args.hosts
      )
    if not says_workdir(command):
      command = [*command, f'--workdir={args.workdir or default_workdir(config_name(command))}']
  if args.dry_run:
    for i in range(args.hosts):
      said = environment('localhost:PORT', args.hosts, i, devices=args.devices_per_host) | env
      print(
        shown(['env', *(f'{name}={value}' for name, value in said.items()), 'python', *command])
      )
    return 0
  return run_hosts(
    command, hosts=args.hosts, devices=args.devices_per_host, out=sys.stdout, env=env
  )


def says_workdir(command: list[str]) -> bool:
  """Whether a command has that flag."""
  return any(re.match(r'--?workdir\b', arg) for arg in command)


def there(args, command: list[str], env: dict[str, str]) -> int:
  """The other backends."""
  from vit_jax.launch.bundle import archive, commit, pins, toplevel
  from vit_jax.launch.job import refuse_names, remember
  from vit_jax.launch.script import container_script, machine_script
  from vit_jax.launch.watch import Babysitter, Pace, call

  root = toplevel(Path.cwd())
  revision, left_out = commit(root, allow_dirty=args.allow_dirty)
  if left_out:
    print_stderr(f'not launched, as it is not in commit {revision}: {left_out}')
  job = described(args, command, env, revision)
  refuse_names(job)
  check(args, job, command)
  with tempfile.TemporaryDirectory(prefix='vit_jax-') as files:
    script = container_script(job) if job.backend == 'gke' else machine_script(job)
    if args.dry_run:
      print(dry_run(job, archive(root, revision, 'FILES'), script))
      return 0
    (Path(files) / 'start.sh').write_text(script)
    (Path(files) / 'pins.txt').write_text(pins(root))
    for step in [archive(root, revision, files), *prepare(job, files)]:
      if (done := call(step)).returncode:
        raise UserError(f'{" ".join(step[:3])} …: {done.stderr.strip()}')
    remember(job)
    babysitter = Babysitter(job, files, pace=Pace(poll=args.poll))
    if args.detach:
      babysitter.create()
      return 0
    return interruptible(babysitter, create=True)


def interruptible(babysitter, *, create: bool) -> int:
  """Watches until the end; Ctrl-C ends the watching alone."""
  try:
    return babysitter.watch(create=create)
  except KeyboardInterrupt:
    name = babysitter.job.name
    print_stderr(
      f'{name} goes on without anybody watching: `launch watch {name}`, `launch delete {name}`'
    )
    return 130


def described(args, command: list[str], env: dict[str, str], revision: str):
  """The job that the flags describe. UserError where they are wrong or missing."""
  from vit_jax.launch.job import WORKDIR, Job
  from vit_jax.tpu.accelerators import accelerator

  if not args.tpu:
    raise UserError(f'--backend={args.backend} needs --tpu, such as --tpu=v5litepod-16')
  slices = accelerator(args.tpu, args.slices)
  if not slices.kind.image and args.backend != 'gke':
    raise UserError(f'--tpu={slices.name} is to be had on GKE alone: --backend=gke')
  if args.slices > 1 and args.backend == 'tpu-vm':
    raise UserError('a TPU VM is one slice: --backend=queued for several')
  if says_workdir(command):
    raise UserError(f'--workdir=gs://BUCKET/PATH goes before the --: on the hosts it is {WORKDIR}')
  if trains(command) or 'doctor' in command:
    command = [*command, f'--workdir={WORKDIR}']
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
    env={'LIBTPU_INIT_ARGS': flags} | env,
    command=tuple(command),
    commit=revision,
    python=f'{sys.version_info.major}.{sys.version_info.minor}',
  )


def check(args, job, command: list[str]):
  """UserError where the run does not go onto the slices; says what it is told to leave unchecked."""
  from vit_jax.launch.memory_check import refuse_unfit

  print_stderr(f'LIBTPU_INIT_ARGS={job.env["LIBTPU_INIT_ARGS"]}')
  if not trains(command):
    return
  slices = job.accelerator
  hosts = slices.topology.hosts if job.backend == 'gke' else slices.hosts * job.slices
  refuse_undivided(
    config_of(command), devices=slices.topology.devices, slices=job.slices, hosts=hosts
  )
  if args.no_plan:
    print_stderr('NOT PLANNED: nobody knows whether this fits, or how long it takes (--no_plan)')
  elif not args.dry_run:
    refuse_unfit(
      config_of(command), settings_of(command), slices, libtpu_args=job.env['LIBTPU_INIT_ARGS']
    )


def refuse_undivided(config, **where: int):
  """UserError where the run's mesh or batches do not divide over these devices."""
  from vit_jax.sharding.mesh import check_mesh_divides
  from vit_jax.training.program import sharded_batch_sizes

  config = validate(config)
  check_mesh_divides(config.mesh.fsdp, batches=sharded_batch_sizes(config), **where)


def prepare(job, files: str) -> list[list[str]]:
  """The commands that come before it is created: a virtual machine takes the code from the bucket, an image holds it."""
  kept = [
    'gcloud',
    'storage',
    'cp',
    f'{files}/code.tar.gz',
    f'{files}/pins.txt',
    f'{job.launch_dir}/',
  ]
  unpacked = [['tar', '-xzf', f'{files}/code.tar.gz', '-C', files], ['rm', f'{files}/code.tar.gz']]
  return [kept, *(unpacked if job.backend == 'gke' else [])]


def dry_run(job, pack: list[str], script: str) -> str:
  """Every command in its order, and the script; FILES is a temporary folder."""
  from vit_jax.launch.watch import BACKENDS

  backend = BACKENDS[job.backend]
  commands = [pack, *prepare(job, 'FILES'), *backend.create(job, 'FILES')]
  after = [
    ('status', [backend.describe(job)]),
    ('logs', list(backend.logs(job, {}).values())[:1]),
    ('delete', backend.delete(job)),
  ]
  parts = ['\n\n'.join(map(shown, commands)), f'# FILES/start.sh\n{script}']
  parts += [f'# launch {verb} {job.name}\n' + '\n'.join(map(shown, steps)) for verb, steps in after]
  return '\n\n'.join(part.rstrip() for part in parts)


def shown(command: list[str]) -> str:
  """A command as a person would type it: a flag a line, where it is long."""
  words = [
    re.sub(r"^'(--\w[\w-]*=)", r"\1'", shlex.quote(word)) for word in command
  ]  # --command='…'
  if len(' '.join(words)) <= 110:
    return ' '.join(words)
  lines = [words[0]]
  for word in words[1:]:
    lines = [*lines, word] if word.startswith('--') else [*lines[:-1], f'{lines[-1]} {word}']
  return ' \\\n  '.join(lines)


def trains(command: list[str]) -> bool:
  """Whether it is one of the two main jobs."""
  return Path(command[0]).name in DEFAULTS


def settings_of(command: list[str]) -> list[str]:
  """The config's flags, the default one with them."""
  settings = [arg for arg in command[1:] if not re.match(r'--?workdir\b', arg)]
  default = Path(command[0]).parent / DEFAULTS[Path(command[0]).name]
  return (
    settings
    if any(re.match(r'--?config(=|$)', arg) for arg in settings)
    else [f'--config={default}', *settings]
  )


def config_of(command: list[str]):
  """The config of a main job's command."""
  return parse_config_flags(settings_of(command))


def default_name(command: list[str]) -> str:
  """'pretrain-b-16-imagenet21k-1124-1343': config and time."""
  file, _, argument = config_name(command).partition(':')
  words = re.findall('[a-z0-9]+', f'{Path(file).stem} {argument}'.lower())
  return '-'.join(['-'.join(words)[:30].strip('-'), time.strftime('%m%d-%H%M')])


def config_name(command: list[str]) -> str:
  """'configs/pretrain.py:B/16,imagenet21k'; of other commands, their last word."""
  if not trains(command):
    return command[-1] if not command[-1].startswith('-') else 'job'
  settings = settings_of(command)
  for i, arg in enumerate(settings):
    if re.fullmatch(r'--?config', arg):
      return settings[i + 1]
    if match := re.fullmatch(r'--?config=(.*)', arg):
      return match[1]
  return ''


def key_and_value(text: str) -> tuple[str, str]:
  """'K=V'; 'K' alone takes the value from here, so that a secret is on no command line."""
  name, equals, value = text.partition('=')
  if not name.isidentifier() or not (equals or name in os.environ):
    raise UserError(
      f'--env={text}: expected NAME=VALUE, or the NAME of a variable that is set here'
    )
  return name, value if equals else os.environ[name]


def add(commands):
  """The arguments. Behind -- stands what Python is to run, on every host the same."""
  command = commands.add_parser(
    'launch',
    help=launch.__doc__,
    description=launch.__doc__,
    usage='vit-jax launch [options] -- run_pretrain.py --config=…\n       vit-jax launch {'
    + ','.join(VERBS)
    + '} NAME',
  )
  command.set_defaults(function=launch)
  option = command.add_argument
  option(
    '--backend',
    choices=('local', 'tpu-vm', 'queued', 'gke'),
    default='local',
    help='where; local: processes of this machine',
  )
  option('--tpu', metavar='TYPE', help='such as v5litepod-256, or v5e:16x16')
  option('--slices', type=positive_int, default=1, help='of that kind')
  option(
    '--spot',
    action='store_true',
    help='cheaper machines that may be taken away: they are asked for again',
  )
  option('--project', help="by default gcloud's own")
  option('--zone', help='such as us-west4-a')
  option('--cluster', help='of GKE, made by xpk')
  option('--name', help='of the job, by default of its config and the time')
  option('--workdir', metavar='URL', help='gs://BUCKET/PATH of the run; a folder, for local')
  option(
    '--data',
    metavar='URL',
    help='gs://BUCKET/PATH that every host finds at /mnt/data; $TFDS_DATA_DIR is set to it',
  )
  option(
    '--env',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='of the command; NAME alone takes its value from here',
  )
  option(
    '--libtpu_args', metavar='FLAGS', help="LIBTPU_INIT_ARGS, in place of the generation's own"
  )
  option('--hosts', type=positive_int, default=2, help='processes, for local')
  option(
    '--devices_per_host',
    type=non_negative_int,
    default=0,
    metavar='N',
    help='simulated CPU devices, for local; 0: what JAX finds',
  )
  option('--no_plan', action='store_true', help='launches what nobody has seen to fit')
  option('--allow_dirty', action='store_true', help='launches the commit without what is not in it')
  option('--detach', action='store_true', help='does not watch over it')
  option('--poll', type=float, default=30, metavar='SECONDS', help='between two looks at its state')
  option('--dry_run', action='store_true', help='prints every command and script, and runs none')
  option(
    'what',
    nargs=argparse.REMAINDER,
    help='-- and the command, or one of ' + ', '.join(VERBS) + ' and a NAME',
  )


def act(verb: str, args: argparse.Namespace) -> int:
  """Does it; the exit code."""
  job = recall(args.name)
  return {'status': status, 'logs': logs, 'watch': watch, 'stop': stop, 'delete': delete}[verb](
    job, args
  )


def status(job: Job, _) -> int:
  """Prints what it is and what the cloud says of it."""
  done = call(BACKENDS[job.backend].describe(job))
  if done.returncode and not GONE.search(done.stderr):
    raise UserError(explain(job, trouble(done.stderr), done.stderr))
  state = BACKENDS[job.backend].read(done.stdout) if not done.returncode else None
  what = f'{job.slices} x {job.tpu}{" spot" if job.spot else ""} ({job.backend}, {job.zone})'
  print(
    f'{job.name}  {f"{state.word} {state.why}".strip() if state else "gone"}  {what}  {job.workdir}  commit {job.commit}'
  )
  print(f'  python {" ".join(job.command)}')
  return 0 if state else 1


def logs(job: Job, _) -> int:
  """Until Ctrl-C, or until nothing follows any more."""
  followed = Followed(sys.stdout)
  for name, command in BACKENDS[job.backend].logs(job, {}).items():
    followed.start(name, command)
  try:
    while None in followed.codes().values():
      time.sleep(0.2)
  except KeyboardInterrupt:
    return 130
  finally:
    followed.end()
  return max(code or 0 for code in followed.codes().values())


def watch(job: Job, _) -> int:
  """As `launch` itself does when it has created it."""

  if job.backend == 'gke':
    raise UserError(f'JobSet itself starts {job.name} again: `launch logs {job.name}` follows it')
  with tempfile.TemporaryDirectory(prefix='vit_jax-') as files:
    (Path(files) / 'start.sh').write_text(machine_script(job))
    return interruptible(Babysitter(job, files, pace=Pace()), create=False)


def stop(job: Job, _) -> int:
  """The machines stay, and are paid for."""
  each(job, BACKENDS[job.backend].stop(job))
  print_stderr(
    f'{job.name} is stopped; its machines are still there, and paid for: `launch delete {job.name}` removes them'
  )
  return 0


def delete(job: Job, args) -> int:
  """Asks first."""
  if not args.yes:
    if not sys.stdin.isatty():
      raise UserError(f'delete {job.name}: --yes where nobody can be asked')
    if (
      input(f'remove {job.slices} x {job.tpu} of {job.name} ({job.workdir} stays)? [y/N] ')
      .strip()
      .lower()
      != 'y'
    ):
      print_stderr('nothing was removed')
      return 1
  each(job, BACKENDS[job.backend].delete(job))
  forget(job)
  print_stderr(f'{job.name} is removed; {job.workdir} stays')
  return 0


def each(job: Job, commands: list[list[str]]):
  """Runs them. UserError where one fails, unless what it is about is gone."""
  for command in commands:
    done = call(command)
    if done.returncode and not GONE.search(done.stderr):
      raise UserError(explain(job, trouble(done.stderr), done.stderr))
