"""A training run of an experiment: its config, initialization, measures and command."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from vit_jax.checkpoint.run_directory import MUTABLE_ON_RESUME
from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.recipes import load_recipe
from vit_jax.settings.fields import flatten_config, with_settings

_RUN_SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExperimentRun:
  """One training run.

  Its measurement belongs to the cell of a table at `row` and `column`. Runs that differ only in
  their seed share a cell.
  """

  row: str
  column: str
  config: str  # FILE:ARGUMENT, as --config takes it.
  # Settings that replace those of the recipe: {'optim.lr': 0.03}.
  settings: dict[str, object] = dataclasses.field(default_factory=dict)
  # The run that it starts from, or a model as `vit_jax.load` takes it. '' means from scratch.
  init: 'ExperimentRun | str' = ''
  # The metrics to report, by the ends of their names.
  measures: tuple[str, ...] = ('accuracy',)
  # Candidate learning rates. The best on held-out examples is chosen.
  learning_rates: tuple[float, ...] = ()
  # The start of the held-out part of the training split: '98%'.
  held_out_from: str = ''
  # FILE:ARGUMENT of another recipe that is a candidate too, with its own learning rate.
  alternative_config: str = ''

  @property
  def is_swept(self) -> bool:
    """Return whether one of several candidates has to be chosen first."""
    return bool(self.learning_rates or self.alternative_config)

  def build_config(self, init: str = '') -> Config:
    """Return the config of the run that starts from `init`.

    Raises UserError if the config is invalid.
    """
    settings = self.settings | ({'init': init} if init else {})
    return validate(with_settings(load_recipe(self.config), settings))


@functools.cache
def run_digest(run: ExperimentRun) -> str:
  """Return the name of the run's directory.

  It is a hash of all settings that affect a measurement, and of the run that this one starts from.
  """
  start = run_digest(run.init) if isinstance(run.init, ExperimentRun) else run.init
  ignored = MUTABLE_ON_RESUME - {'eval_every'}  # `eval_every` decides which measurements exist.
  settings = flatten_config(run.build_config(start))
  config = {name: value for name, value in settings.items() if name not in ignored}
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def init_chain(run: ExperimentRun) -> Iterator[ExperimentRun]:
  """Yield the runs that this one starts from, earliest first, and the run itself."""
  if isinstance(run.init, ExperimentRun):
    yield from init_chain(run.init)
  yield run


def run_candidates(run: ExperimentRun) -> list[ExperimentRun]:
  """Return the run with each of its learning rates, and with its alternative recipe if any."""
  plain = dataclasses.replace(run, learning_rates=(), alternative_config='')
  candidates = [
    dataclasses.replace(plain, settings=run.settings | {'optim.lr': lr})
    for lr in run.learning_rates
  ]
  if run.alternative_config:
    candidates.append(dataclasses.replace(plain, config=run.alternative_config))
  return candidates


def sweep_candidates(run: ExperimentRun) -> list[ExperimentRun]:
  """Return the candidates, trained without the held-out examples and evaluated on them."""
  return [_hold_out_examples(candidate) for candidate in run_candidates(run)]


def _hold_out_examples(run: ExperimentRun) -> ExperimentRun:
  """Return the run on the training split without its held-out part, evaluated on that part.

  All seeds share one sweep, so the seed is removed. Raises UserError if the split is sliced
  already.
  """
  data = run.build_config('-' if run.init else '').data
  if '[' in data.split:
    raise UserError(
      f'{run.config}: the split {data.split!r} is sliced already, so no part of it can be held out'
    )

  def slice_splits(cut: str) -> str:
    return '+'.join(f'{split}[{cut}]' for split in data.split.split('+'))

  settings = {name: value for name, value in run.settings.items() if name != 'seed'}
  settings |= {
    'data.eval': data.train,
    'data.split': slice_splits(f':{run.held_out_from}'),
    'data.eval_split': slice_splits(f'{run.held_out_from}:'),
  }
  if 'probes' in settings:
    settings['probes'] = ()
  return dataclasses.replace(run, settings=settings)


def repeat_over_seeds(
  runs: list[ExperimentRun], seeds: tuple[int, ...] = _RUN_SEEDS
) -> list[ExperimentRun]:
  """Return each run once for each seed."""
  return [
    dataclasses.replace(run, settings=run.settings | {'seed': seed})
    for run in runs
    for seed in seeds
  ]


def run_workdir(run: ExperimentRun, root: Path) -> Path:
  """Return the directory of the run."""
  return root / run_digest(run)


def format_run_command(run: ExperimentRun, root: Path) -> str:
  """Return the shell command that trains the run."""
  init = run_workdir(run.init, root) if isinstance(run.init, ExperimentRun) else run.init
  settings = run.settings | ({'init': init} if init else {})
  flags = [f'--config.{name}={format_flag_value(value)}' for name, value in settings.items()]
  words = ['python -m vit_jax train', f'--config={run.config}', *map(_quote_flag, flags)]
  return ' '.join([*words, f'--workdir={run_workdir(run, root)}'])


def format_flag_value(value: object) -> str:
  """Return the text of a value as a --config.FIELD flag takes it."""
  return ','.join(map(str, value)) or '()' if isinstance(value, tuple) else str(value)


def _quote_flag(flag: str) -> str:
  """Quote a flag if it has characters that a shell interprets."""
  return f"'{flag}'" if set(flag) & set('[]*() ') else flag
