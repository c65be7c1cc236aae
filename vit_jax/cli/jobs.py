"""From a command line to a run: flags, the config, where results go, and errors in one line.

The two main jobs are this function with different default configs.
"""

import contextlib
import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from vit_jax.config import RENAMED_SETTINGS, Config, flatten_config
from vit_jax.errors import UserError, did_you_mean
from vit_jax.runtime.cluster import HEARTBEAT_TIMEOUT, exit_on_error, initialize_cluster
from vit_jax.runtime.files import user_cache_dir
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog


def run_train_job(default_config: Path):
  """Reads --config, --config.FIELD and --workdir, and trains. Exits as exits.py says: 2 after one line the user can mend."""

  def job():
    check_config_flags(sys.argv[1:])
    config = config_flags.DEFINE_config_file(
      'config', str(default_config), 'The recipe: FILE or FILE:ARGUMENT.'
    )
    workdir = flags.DEFINE_string(
      'workdir', None, 'Where the run goes, and is taken up again; by default runs/CONFIG-TIME.'
    )

    hosts = define_cluster_flags()

    def main(_):
      with training_runtime(
        workdir.value, **{name: flag.value for name, flag in hosts.items()}
      ) as alive:
        from vit_jax.train import (
          train,
        )  # With jax: after the flags are known to be right, so that --help is quick.

        name = config_flags.get_config_filename(flags.FLAGS['config'])
        train(config.value, Path(workdir.value or default_workdir(name)), **alive)

    app.run(main, flags_parser=parse_absl_flags)

  run_and_report_errors(job)


@contextlib.contextmanager
def training_runtime(workdir: str | None, **hosts) -> Iterator[dict[str, object]]:
  """This process as one that trains: it answers signals, is ended where it is stuck, and has met the other hosts, as
  `join_cluster` does. Gives {'preemption': …, 'watchdog': …}, as `train` takes them."""
  faulthandler.enable()  # JAX aborts a process that has lost another host: its stacks are shown before.
  stopping, watchdog = Preemption(), Watchdog()
  stopping.install_handlers()
  processes = join_cluster(**hosts)
  watchdog.start(single_process=processes == 1)
  if processes > 1 and not workdir:
    raise UserError('several hosts need one --workdir: their clocks would name several')
  logging.set_verbosity(logging.WARNING)  # Libraries' own progress is not ours.
  enable_compilation_cache()
  with exit_on_error(processes):
    yield {'preemption': stopping, 'watchdog': watchdog}


def define_cluster_flags() -> dict[str, flags.FlagHolder]:
  """The flags that say which other processes train along; a launcher says them by environment variables."""
  env = os.environ.get
  process = env('VIT_JAX_PROCESS')
  return {
    'coordinator': flags.DEFINE_string(
      'coordinator', env('VIT_JAX_COORDINATOR'), 'HOST:PORT of the first process.'
    ),
    'processes': flags.DEFINE_integer(
      'processes', int(env('VIT_JAX_PROCESSES', '0')), 'How many; 0: the pod or job knows.'
    ),
    'process': flags.DEFINE_integer(
      'process', int(process) if process else None, 'Which of them this is, from 0.'
    ),
    'timeout': flags.DEFINE_integer('hosts_timeout', 300, 'Seconds to wait for the others.'),
    'heartbeat': flags.DEFINE_integer(
      'hosts_heartbeat', HEARTBEAT_TIMEOUT, 'Seconds after which a host that is silent is lost.'
    ),
  }


def join_cluster(**said) -> int:
  """Meets the other hosts, if there are any, as `distributed.initialize` does; how many there are with this one."""
  import jax

  # That service, too, would answer SIGTERM, and Orbax asks it with numbers of its own; runtime/preemption.py does both itself.
  jax.config.update('jax_enable_preemption_service', False)
  initialize_cluster(**said)
  return jax.process_count()


def parse_config_flags(args: list[str]) -> Config:
  """The config that flags say: --config=FILE:ARGUMENT and any --config.FIELD=VALUE, as the two main jobs take them."""
  args = [
    f'--config={args[i + 1]}' if arg == '--config' and i + 1 < len(args) else arg
    for i, arg in enumerate(args)
  ]
  args = [arg for i, arg in enumerate(args) if arg.startswith('-')]
  check_config_flags(args)
  values, argv = flags.FlagValues(), ['', *args]
  config = config_flags.DEFINE_config_file(
    'config', None, 'The recipe: FILE or FILE:ARGUMENT.', values, sys_argv=argv
  )
  try:
    left = values(argv)[1:]
  except flags.Error as error:
    raise UserError(str(error)) from None
  if config.value is None or left:
    raise UserError(
      f'expected --config=FILE:ARGUMENT and --config.FIELD=VALUE, got {" ".join(args) or "nothing"}'
    )
  return config.value


def run_and_report_errors(function: Callable[[], object]):
  """Calls `function`; a UserError becomes a line on the screen, and its exit code."""
  try:
    function()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(error.exit_code)


def check_config_flags(args: list[str]):
  """UserError for a --config file that is not there, or a --config.FIELD that no config has, with the nearest name."""
  known = ['config.' + name for name in flatten_config(Config())]
  for arg in args:
    name = re.fullmatch(r'--?(?:no)?(config\.[\w.]+)(=.*)?', arg)
    if name and (new := RENAMED_SETTINGS.get(name[1].removeprefix('config.'))):
      raise UserError(f'--{name[1]} is called --config.{new} now')
    if name and name[1] not in known:
      raise UserError(f'--{name[1]} is no setting.{did_you_mean(name[1], known)}')
    file = re.fullmatch(r'--?config=([^:]*)(:.*)?', arg)
    if file and not Path(file[1]).is_file():
      raise UserError(
        f'--config={file[1]}: there is no such file; configs/ has those of this project'
      )


def parse_absl_flags(argv: list[str]) -> list[str]:
  """absl's parser, with a UserError for what it refuses."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(str(error)) from None


def default_workdir(config_file: str) -> str:
  """runs/CONFIG-TIME, where CONFIG is the file's name and its argument: 'finetune-S_16_folder'."""
  file, _, argument = config_file.partition(':')
  name = '-'.join([Path(file).stem, *([re.sub(r'[^\w.]+', '_', argument)] if argument else [])])
  return f'runs/{name}-{time.strftime("%Y%m%d-%H%M%S")}'


def enable_compilation_cache():
  """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
  import jax

  default = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(user_cache_dir('compiled')))
  jax.config.update('jax_compilation_cache_dir', default)
