"""Config flags, the runtime of training commands, and errors as one line."""

import contextlib
import faulthandler
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from vit_jax.checkpoint.renamed_settings import RENAMED_SETTINGS
from vit_jax.config import Config
from vit_jax.errors import UserError, did_you_mean, format_error
from vit_jax.recipes import load_recipe
from vit_jax.runtime.cluster import exit_on_error, initialize_cluster
from vit_jax.runtime.files import user_cache_dir
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.screen import ignore_lost_stdout, prepare_screen, print_stderr, use_utf8
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.settings.fields import flatten_config


@contextlib.contextmanager
def training_runtime(workdir: str | None, **hosts) -> Iterator[dict[str, object]]:
  """Set up this process for training, and yield the keyword arguments of `train`.

  Signal handlers and the watchdog are installed, and the process has joined the other hosts.
  `hosts` are the arguments of `initialize_cluster`.

  Raises UserError if there are several hosts and no `workdir`.
  """
  ignore_lost_stdout()
  print_stderr('waiting for JAX to load and find its devices')
  faulthandler.enable()  # JAX aborts a process that has lost another host: show the stacks first.
  preemption, watchdog = Preemption(), Watchdog()
  preemption.install_handlers()
  hide_library_messages()
  processes = join_cluster(**hosts)
  watchdog.start(single_process=processes == 1)
  if processes > 1 and not workdir:
    raise UserError('several hosts need --workdir: each would choose its own from its clock')
  enable_compilation_cache()
  with exit_on_error(processes):
    yield {'preemption': preemption, 'watchdog': watchdog}


def hide_library_messages():
  """Hide the progress of JAX, Orbax and Grain, and the tracebacks of Orbax's threads.

  The checkpoint manager reports a failed save in one line.
  """
  logging.set_verbosity(logging.FATAL)
  getLogger('asyncio').setLevel(CRITICAL)


def join_cluster(**hosts) -> int:
  """Join the other hosts, if there are any, and return the number of processes."""
  import jax

  # JAX's preemption service would handle SIGTERM too; runtime/preemption.py does.
  jax.config.update('jax_enable_preemption_service', False)
  initialize_cluster(**hosts)
  return jax.process_count()


def parse_config_flags(
  args: Sequence[str], *, default: str = '', options: Sequence[str] = ()
) -> Config:
  """Return the config of --config=RECIPE[:ARGUMENT] and any --config.FIELD=VALUE.

  Args:
    args: the flags, and nothing else.
    default: the recipe to use if there is no --config.
    options: names of the command's other options, to suggest for a misspelled one.

  Raises:
    UserError: a flag is unknown or has a wrong value, or there is no recipe.
  """
  recipe = recipe_of_flags(args) or default
  if not recipe:
    got = ' '.join(args) or 'nothing'
    raise UserError(f'expected --config=RECIPE:ARGUMENT and --config.FIELD=VALUE, got {got}')
  others = _without_recipe(args)
  check_config_flags(others, options)
  values, argv = flags.FlagValues(), ['', *others]
  config = config_flags.DEFINE_config_dataclass(
    'config', load_recipe(recipe), flag_values=values, sys_argv=argv
  )
  try:
    rest = values(argv)[1:]
  except flags.Error as error:
    raise UserError(str(error)) from None
  if rest:
    raise UserError(f'unexpected argument {rest[0]!r}; expected --config.FIELD=VALUE')
  return config.value


def recipe_of_flags(args: Sequence[str]) -> str:
  """Return the value of the last --config=RECIPE or --config RECIPE, or ''."""
  recipe = ''
  for arg, value in itertools.pairwise([*args, '']):
    if match := re.fullmatch(r'--?config(?:=(.*))?', arg, flags=re.DOTALL):
      recipe = value if match[1] is None else match[1]
  return recipe


def _without_recipe(args: Sequence[str]) -> list[str]:
  """Return the flags without --config=RECIPE and --config RECIPE."""
  return [
    arg
    for previous, arg in itertools.pairwise(['', *args])
    if not re.fullmatch(r'--?config', previous) and not re.match(r'--?config(=|\Z)', arg)
  ]


def check_config_flags(args: Sequence[str], options: Sequence[str] = ()):
  """Raise UserError for a flag other than --config.FIELD, and suggest the nearest name.

  `options` are the names of other options that a suggestion may be.
  """
  known = ['config.' + name for name in flatten_config(Config())]
  for arg in args:
    match = re.fullmatch(r'--?((?:no)?([A-Za-z][\w.]*))(=.*)?', arg, flags=re.DOTALL)
    if not match:
      if re.match(r'--?(no)?config\.', arg):
        raise UserError(f'{arg.partition("=")[0]} is not a setting; expected --config.FIELD=VALUE')
      continue
    name = match[1] if match[1] in known else match[2]
    if new := RENAMED_SETTINGS.get(name.removeprefix('config.')):
      raise UserError(f'--{name} was renamed to --config.{new}')
    if name not in known:
      kind, names = ('a setting', known) if '.' in name else ('an option', options or ('config',))
      raise UserError(f'--{name} is not {kind}.{did_you_mean(name, names)}')


def run_and_report_errors(function: Callable[[], object]):
  """Call `function`. On a UserError, print one line and exit with the error's code."""
  use_utf8()
  prepare_screen()
  try:
    function()
  except UserError as error:
    print(format_error(error), file=sys.stderr)
    sys.exit(error.exit_code)


def default_workdir(recipe: str) -> str:
  """Return runs/RECIPE-TIME, such as 'runs/finetune-S_16_folder-20250131-120000'."""
  return f'runs/{name_run(recipe)}-{time.strftime("%Y%m%d-%H%M%S")}'


def name_run(recipe: str) -> str:
  """Return the name of a recipe's runs, such as 'finetune-S_16_folder'."""
  file, _, argument = recipe.partition(':')
  return '-'.join([Path(file).stem, *([re.sub(r'[^\w.]+', '_', argument)] if argument else [])])


def enable_compilation_cache():
  """Cache compiled programs in $JAX_COMPILATION_CACHE_DIR or in the user's cache directory."""
  import jax

  default = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(user_cache_dir('compiled')))
  jax.config.update('jax_compilation_cache_dir', default)
