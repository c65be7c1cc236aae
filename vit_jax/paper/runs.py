"""A run of an experiment: what is trained, from what, what is measured of it, and the command that does it by hand."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import types
from collections.abc import Iterator
from pathlib import Path

from vit_jax.checkpoint.run_directory import MUTABLE_ON_RESUME
from vit_jax.config import Config, flatten_config, with_settings
from vit_jax.config_checks import validate
from vit_jax.errors import UserError

CHECKOUT_ROOT = Path(__file__).parents[2]  # Of a checkout: configs/ is no part of the package.
_RUN_SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExperimentRun:
  """One training run. Its number stands in a table at `row` and `column`; those of several seeds stand there together."""

  row: str
  column: str
  config: str  # FILE:ARGUMENT, as --config takes it.
  settings: dict[str, object] = dataclasses.field(
    default_factory=dict
  )  # {'optim.lr': 0.03}, over the config's own.
  init: 'ExperimentRun | str' = (
    ''  # The run that it starts from, or whatever `vit_jax.load` takes; '' means from scratch.
  )
  measures: tuple[str, ...] = ('accuracy',)  # Of its records: the end of their names.
  rates: tuple[float, ...] = ()  # Learning rates of which the best on examples held out is taken,
  held_out: str = ''  # the last of the training split from here on: '98%'.
  otherwise: str = (
    ''  # FILE:ARGUMENT of another recipe, which takes part in that choice with its own rate.
  )

  @property
  def swept(self) -> bool:
    """Whether one of several ways is to be chosen first."""
    return bool(self.rates or self.otherwise)

  def built(self, init: str = '') -> Config:
    """The config with the settings, starting from `init`. UserError for what is wrong with it."""
    settings = self.settings | ({'init': init} if init else {})
    return validate(with_settings(load_config_file(self.config), settings))


def load_config_file(config: str) -> Config:
  """The config that FILE:ARGUMENT names. UserError where there is no such file."""
  file, _, argument = config.partition(':')
  get_config = import_config_file(file).get_config
  return get_config(argument) if argument else get_config()


@functools.cache
def import_config_file(file: str) -> types.ModuleType:
  """A config file of this project."""
  path = CHECKOUT_ROOT / file
  if not path.is_file():
    raise UserError(
      f'{path} is not there: tables are made from a checkout of the project, which has configs/'
    )
  spec = importlib.util.spec_from_file_location(path.stem, path)
  spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
  return made


@functools.cache
def run_digest(run: ExperimentRun) -> str:
  """Names the run's directory: a hash of all settings that a number depends on, and of the run that it starts from."""
  start = run_digest(run.init) if isinstance(run.init, ExperimentRun) else run.init
  free = MUTABLE_ON_RESUME - {'eval_every'}  # It says which numbers there are.
  config = {
    name: value for name, value in flatten_config(run.built(start)).items() if name not in free
  }
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def init_chain(run: ExperimentRun) -> Iterator[ExperimentRun]:
  """The runs that this one starts from, the first of them first, and itself."""
  if isinstance(run.init, ExperimentRun):
    yield from init_chain(run.init)
  yield run


def run_candidates(run: ExperimentRun) -> list[ExperimentRun]:
  """The run at each of its learning rates, and by the other recipe if there is one."""
  plain = dataclasses.replace(run, rates=(), otherwise='')
  rates = [
    dataclasses.replace(plain, settings=run.settings | {'optim.lr': rate}) for rate in run.rates
  ]
  return rates + ([dataclasses.replace(plain, config=run.otherwise)] if run.otherwise else [])


def sweep_candidates(run: ExperimentRun) -> list[ExperimentRun]:
  """Its ways, on the training split without the examples that are held out, evaluated on those."""
  return [_hold_out_examples(way) for way in run_candidates(run)]


def _hold_out_examples(run: ExperimentRun) -> ExperimentRun:
  """The run of a sweep. UserError where its split is cut already."""
  data = run.built('-' if run.init else '').data
  if '[' in data.split:
    raise UserError(
      f'{run.config}: the split {data.split!r} is cut already: nothing can be held out of it'
    )
  parts = lambda cut: '+'.join(f'{split}[{cut}]' for split in data.split.split('+'))
  cut = {
    'data.eval': data.train,
    'data.split': parts(f':{run.held_out}'),
    'data.eval_split': parts(f'{run.held_out}:'),
  }
  settings = {
    name: value for name, value in run.settings.items() if name != 'seed'
  } | cut  # One sweep for all seeds.
  return dataclasses.replace(
    run, settings=settings | ({'probes': ()} if 'probes' in settings else {})
  )


def repeat_over_seeds(
  runs: list[ExperimentRun], seeds: tuple[int, ...] = _RUN_SEEDS
) -> list[ExperimentRun]:
  """Each run once for each seed."""
  return [
    dataclasses.replace(run, settings=run.settings | {'seed': seed})
    for run in runs
    for seed in seeds
  ]


def run_workdir(run: ExperimentRun, root: Path) -> Path:
  """Where it goes, and is taken up again."""
  return root / run_digest(run)


def format_run_command(run: ExperimentRun, root: Path) -> str:
  """What does the run by hand."""
  init = run_workdir(run.init, root) if isinstance(run.init, ExperimentRun) else run.init
  settings = run.settings | ({'init': init} if init else {})
  flags = [f'--config.{name}={format_flag_value(value)}' for name, value in settings.items()]
  script = 'run_finetune.py' if init else 'run_pretrain.py'
  return ' '.join(
    [
      'python',
      script,
      f'--config={run.config}',
      *map(_quote_flag, flags),
      f'--workdir={run_workdir(run, root)}',
    ]
  )


def format_flag_value(value: object) -> str:
  """As a flag takes it."""
  return ','.join(map(str, value)) or '()' if isinstance(value, tuple) else str(value)


def _quote_flag(flag: str) -> str:
  """For a shell, which has its own idea of brackets."""
  return f"'{flag}'" if set(flag) & set('[]*() ') else flag
