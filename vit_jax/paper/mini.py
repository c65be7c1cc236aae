"""Runs of the paper's experiments in miniature, on CIFAR-10, Fashion-MNIST, digits and photos.

The sizes and the recipe are those of configs/mini.py. A scale of data is a part of the training
images, with the same share of every class; all parts are trained on for the same number of steps.
A scale of compute is a part of the steps. Runs that several experiments share are trained once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.paper.runs import ExperimentRun, init_chain, run_digest
from vit_jax.recipes import load_recipe
from vit_jax.training.program import training_flops

# Parts of the training images, and of the steps.
SCALES = {'1/16': 16, '1/4': 4, 'all': 1}
SMALLEST, MIDDLE, ALL = SCALES
# Accuracy on digits of frozen features, with five examples of each digit.
FEWSHOT_METRIC = 'digits_5shot'
DATA_TITLES = {'cifar10': 'CIFAR-10', 'fashion_mnist': 'Fashion-MNIST'}
FAMILIES = ('ViT', 'R', 'R+ViT')
SIZES = ('S', 'M', 'L')
SWEEP = 'learning_rates'  # The experiment whose results the others use.
HELD_OUT_PERCENT = 10  # Of the training images, to choose learning rates.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MiniEffort:
  """The amount of training in the miniatures, and their data."""

  step_factor: float = 1.0  # Multiplies the steps of every run. 1 is the design; less is a test.
  max_runs: int = 0  # Runs of each experiment and seed; the others are skipped. 0 means all.
  seeds: tuple[int, ...] = (0, 1, 2)
  # Sources in place of those of configs/mini.py: {'cifar10': 'folder:cifar10'}. Without 'flowers',
  # runs on photos are skipped.
  sources: dict[str, str] = dataclasses.field(default_factory=dict)
  # The learning rates that the sweep chose: {'ViT-S': 2e-3}. Others are those of configs/mini.py.
  rates: dict[str, float] = dataclasses.field(default_factory=dict)


def _make_run(
  effort: MiniEffort,
  seed: int,
  model: str,
  row: str,
  column: str,
  *,
  data: str = 'cifar10',
  images: str = ALL,
  steps: str = ALL,
  rate: str = '',
  settings: dict[str, object] | None = None,
  **fields,
) -> ExperimentRun:
  """Return the run of a model of configs/mini.py.

  Args:
    effort: the amount of training.
    seed: of the run.
    model: the model.
    row: of the table.
    column: of the table.
    data: the training set.
    images: the scale of the data.
    steps: the scale of the steps.
    rate: whose learning rate to use, by the row of the sweep; by default the model's.
    settings: other settings.
    **fields: other fields of the run.
  """
  config = f'configs/mini.py:{model},{data}'
  chosen: dict[str, object] = {'seed': seed} | (settings or {})
  if data in effort.sources:
    chosen['data.train'] = effort.sources[data]
  if images != ALL:
    chosen['data.split'] = f'train/held_out:{100 / SCALES[images]:g}%'
  if 'steps' not in chosen and (effort.step_factor != 1 or steps != ALL):
    chosen['steps'] = _scale(load_recipe(config).steps / SCALES[steps], effort)
  if (rate or model) in effort.rates:
    chosen['optim.lr'] = effort.rates[rate or model]
  fields = {'measures': ('accuracy', FEWSHOT_METRIC)} | fields
  return ExperimentRun(row=row, column=column, config=config, settings=chosen, **fields)


def _scale(steps: float, effort: MiniEffort) -> int:
  """Return the number of steps at the effort, at least 3."""
  return max(3, round(steps * effort.step_factor))


# Sweeps of the learning rate, at a quarter of the steps. {row: (model, settings, learning rates)}.
_ADAM_RATES = (1e-3, 3e-3, 1e-2)
_SGD = {'optim.name': 'sgd', 'optim.lr': 0.1, 'optim.weight_decay': 1e-3}
_GAP = {'model.pool': 'gap'}
SWEEPS = {f'{family}-{size}': ({}, _ADAM_RATES) for size in SIZES for family in FAMILIES} | {
  'R-S SGD': (_SGD, (0.03, 0.1, 0.3)),
  'ViT-S GAP': (_GAP, _ADAM_RATES),
}


def steps_column(steps: str) -> str:
  """Return the name of a scale of compute: '1/4 of the steps'."""
  return 'all steps' if steps == ALL else f'{steps} of the steps'


def _learning_rate_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Candidate learning rates on held-out images, for the first seed only."""
  if seed != effort.seeds[0]:
    return []
  part = {
    'data.split': f'train/rest:{HELD_OUT_PERCENT}%',
    'data.eval_split': f'train/held_out:{HELD_OUT_PERCENT}%',
    'probes': (),
  }
  plain = dataclasses.replace(effort, rates={})
  return [
    _make_run(
      plain, seed, row.partition(' ')[0], row, f'{rate:g}', steps=MIDDLE, measures=('accuracy',),
      settings=settings | part | {'optim.lr': rate},
    )
    for row, (settings, rates) in SWEEPS.items()
    for rate in rates
  ]  # fmt: skip


def choose_rates(records: Iterable[dict]) -> dict[str, float]:
  """Return the learning rate with the highest accuracy in the records of the sweep, by row."""
  best = {}
  for record in records:
    accuracy = float(record['value'])
    if record['row'] not in best or accuracy > best[record['row']][0]:
      best[record['row']] = (accuracy, float(record['column']))
  return {row: rate for row, (_, rate) in best.items()}


def _data_size_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Experiment 2, as in Figures 3 and 4: accuracy against the number of training images.

  Two models of equal compute on two data sets, and a larger one.
  """
  cases = [
    ('cifar10', ('ViT-S', 'R-S'), (ALL, MIDDLE, SMALLEST)),
    ('fashion_mnist', ('ViT-S', 'R-S'), (ALL, SMALLEST)),
    ('cifar10', ('ViT-L',), (ALL, SMALLEST)),
  ]
  return [
    _make_run(
      effort, seed, model, model, f'{DATA_TITLES[data]}, {images}', data=data, images=images
    )
    for data, models, scales in cases
    for images in scales
    for model in models
  ]


def _scaling_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Experiment 3, as in Table 6 and Figure 5: accuracy of three families against compute.

  Models of the middle size are not trained for all steps.
  """
  return [
    _make_run(
      effort, seed, f'{family}-{size}', f'{family}-{size}', steps_column(steps), steps=steps
    )
    for steps in (ALL, MIDDLE, SMALLEST)
    for size in SIZES
    if (size, steps) != ('M', ALL)
    for family in FAMILIES
  ]


def _optimizer_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """ResNets pre-trained with Adam and with SGD and fine-tuned, as in Table 7."""
  adam = _make_run(effort, seed, 'R-S', 'R-S Adam', 'pre-training')
  sgd = _make_run(effort, seed, 'R-S', 'R-S SGD', 'pre-training', rate='R-S SGD', settings=_SGD)
  return [adam, sgd] + [
    _finetune_run(effort, start, start.row, target)
    for start in (adam, sgd)
    for target in _targets(effort)
  ]


def _position_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Position embeddings by their kind and by where they are added, as in Table 8.

  All have a quarter of the steps; none and the default have all of them too.
  """
  kinds = {'1-D learned': 'learned', 'none': 'none', '2-D learned': 'learned2d'}
  kinds |= {'relative': 'relative'}
  places = {'Stem only': 'stem', 'Every layer': 'every', 'Every layer shared': 'shared'}
  default = {'model.position': 'learned', 'model.position_at': 'stem'}
  runs = []
  for row, kind in kinds.items():
    for column, place in places.items() if kind.startswith('learned') else [('Stem only', 'stem')]:
      changed = {'model.position': kind, 'model.position_at': place}
      changed = {name: value for name, value in changed.items() if value != default[name]}
      runs.append(_make_run(effort, seed, 'ViT-S', row, column, steps=MIDDLE, settings=changed))
  for row in ('1-D learned', 'none'):
    changed = {} if row == '1-D learned' else {'model.position': 'none'}
    runs.append(_make_run(effort, seed, 'ViT-S', row, 'Stem only, all steps', settings=changed))
  return runs


def _pooling_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """A class token and the mean of the patches, as in Figure 9.

  The mean is trained at the learning rate of the class token and at its own.
  """
  clock = {'eval_every': '25%', 'probe_every': '25%'}
  kinds = {
    'CLS': ('', {}),
    'GAP at its rate': ('ViT-S GAP', _GAP),
    'GAP at the rate of CLS': ('', _GAP),
  }
  return [
    _make_run(effort, seed, 'ViT-S', row, 'CIFAR-10', rate=rate, settings=settings | clock)
    for row, (rate, settings) in kinds.items()
  ]


# Fine-tuning: SGD at learning rate 0.03 without weight decay, as in Table 4.
_TRANSFER_SGD = {
  'optim.name': 'sgd',
  'optim.lr': 0.03,
  'optim.schedule': 'cosine',
  'optim.weight_decay': 0.0,
  'optim.lr_end': 0.0,
  'probes': (),
}
# {name: (data, its scale, settings)}.
TARGETS = {
  'digits': ('digits', ALL, {'data.batch': 64, 'steps': 200}),
  'Fashion-MNIST, 1/16': ('fashion_mnist', SMALLEST, {'data.batch': 64, 'steps': 200}),
  'flowers': ('flowers', ALL, {'data.batch': 64, 'steps': 200}),
}


def _targets(effort: MiniEffort) -> list[str]:
  """Return the names of the targets, flowers only if the effort has photos."""
  return [name for name in TARGETS if name != 'flowers' or 'flowers' in effort.sources]


def _finetune_run(
  effort: MiniEffort,
  start: ExperimentRun,
  row: str,
  target: str,
  *,
  column: str = '',
  size: int = 32,
) -> ExperimentRun:
  """Return the run that fine-tunes `start` on a target at a size."""
  data, images, settings = TARGETS[target]
  settings = settings | _TRANSFER_SGD | {'steps': _scale(settings['steps'], effort)}
  settings |= {'data.size': (size, size)} if size != 32 else {}
  return _make_run(
    dataclasses.replace(effort, rates={}), start.settings['seed'], _model_of(start), row,
    column or target, data=data, images=images, settings=settings, init=start,
    measures=('accuracy',),
  )  # fmt: skip


def _model_of(run: ExperimentRun) -> str:
  """Return the model of configs/mini.py of a run."""
  return run.config.partition(':')[2].partition(',')[0]


def _transfer_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Experiment 1, as in Tables 2, 5 and 9: fine-tuning after little pre-training data and all."""
  return [
    _finetune_run(
      effort,
      _make_run(effort, seed, model, model, images, images=images),
      f'{model} from {images}',
      target,
    )
    for model in ('ViT-S', 'R-S', 'ViT-L')
    for images in (ALL, SMALLEST)
    for target in _targets(effort)
  ]


# Sizes of pre-training and of fine-tuning. Images of CIFAR-10 have 32 pixels, so up to 32 a higher
# resolution shows more of them, and above it does not. Photos have more than 200.
RESOLUTIONS = {16: (16, 24), 32: (32, 48)}


def _resolution_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Fine-tuning at a higher resolution, as in §3.2: for few steps and for more."""
  runs = []
  for model, (before, sizes) in itertools.product(('ViT-S', 'R-S'), RESOLUTIONS.items()):
    settings = {'data.size': (before, before)} if before != 32 else {}
    start = _make_run(effort, seed, model, model, 'CIFAR-10', settings=settings)
    for after in sizes:
      settings = _TRANSFER_SGD | {'data.size': (after, after)}
      runs += [
        _make_run(
          dataclasses.replace(effort, rates={}), seed, model,
          resolution_row(before, after, steps), model, steps=steps, init=start,
          settings=settings, measures=('accuracy',),
        )
        for steps in (SMALLEST, MIDDLE)
      ]  # fmt: skip
      if before == 32 and 'flowers' in effort.sources:
        row = resolution_row(before, after)
        runs.append(_finetune_run(effort, start, row, 'flowers', column=model, size=after))
  return runs


def resolution_row(before: int, after: int, steps: str = '') -> str:
  """Return the row of the table: fine-tuning on CIFAR-10 for `steps`, or on photos."""
  data = f'CIFAR-10, {steps_column(steps)}' if steps else 'flowers'
  return f'{data}, {before} to {after} px'


def _masked_patch_runs(effort: MiniEffort, seed: int) -> list[ExperimentRun]:
  """Self-supervision, as in §4.6: few labels after masked patch prediction, and from scratch.

  Masked patches are predicted on all images without labels. Both are then trained on the labels of
  a part, for the same number of steps.
  """
  base = {'model.pool': 'gap', 'probes': ()}
  mask = base | {'mask.target': 'colour', 'optim.weight_decay': 0.0}
  start = _make_run(
    effort, seed, 'ViT-S', 'ViT-S', 'masked patches', rate='ViT-S GAP', settings=mask
  )
  return [
    _make_run(
      effort, seed, 'ViT-S', row, f'{images} of the labels', images=images, steps=MIDDLE,
      rate='ViT-S GAP', settings=base, init=init, measures=('accuracy',),
    )
    for images in (SMALLEST, MIDDLE)
    for row, init in (('masked patches first', start), ('from scratch', ''))
  ]  # fmt: skip


def select_mini_runs(
  experiment: str, effort: MiniEffort, seeds: Iterable[int]
) -> list[ExperimentRun]:
  """Return the runs of an experiment, at most `effort.max_runs` of them for each seed."""
  runs_of_seeds = [MINI_EXPERIMENTS[experiment](effort, seed) for seed in seeds]
  return [run for runs in runs_of_seeds for run in runs[: effort.max_runs or None]]


# In the order in which they run.
MINI_EXPERIMENTS: dict[str, Callable[[MiniEffort, int], list[ExperimentRun]]] = {
  SWEEP: _learning_rate_runs,
  'data_size': _data_size_runs,
  'scaling': _scaling_runs,
  'resolution': _resolution_runs,
  'transfer': _transfer_runs,
  'pooling': _pooling_runs,
  'masked_patches': _masked_patch_runs,
  'positions': _position_runs,
  'optimizers': _optimizer_runs,
}


# Of two CPU cores in float32: 10 to 13 GFLOPs for each second of a core were measured with models
# of size S. The time of a run for compilation, evaluation and checkpoints is a guess.
_FLOPS_PER_SECOND = 20e9
_SECONDS_PER_RUN = 8


def estimate_runs(experiments: Iterable[str], effort: MiniEffort) -> Iterator[str]:
  """Yield a line for each run in order, with an estimate of its minutes, and the total."""
  minutes: dict[str, float] = {}
  for seed, name in itertools.product(effort.seeds, experiments):
    runs = select_mini_runs(name, effort, (seed,))
    for run in itertools.chain.from_iterable(map(init_chain, runs)):
      if run_digest(run) not in minutes:
        minutes[run_digest(run)] = _estimate_minutes(run)
        yield f'{_estimate_minutes(run):5.1f} min  seed {seed}  {name}: {run.row}, {run.column}'
  hours = sum(minutes.values()) / 60
  yield f'{len(minutes)} runs, {hours:.1f} hours of two CPU cores (an estimate)'


def _estimate_minutes(run: ExperimentRun) -> float:
  """Return the minutes of a run, without those that it starts from."""
  config = run.build_config('-' if run.init else '')
  images = config.steps * config.data.batch
  flops = training_flops(config, build_model(config.model, 10), images, None)
  return (flops / _FLOPS_PER_SECOND + _SECONDS_PER_RUN) / 60


def check_sources(effort: MiniEffort):
  """Raise UserError if a source of the effort cannot be opened."""
  if not effort.sources.get('flowers', 'folder:').startswith('folder:'):
    raise UserError(f'--photos={effort.sources["flowers"]}: expected folder:PATH')
  for name in ('cifar10', 'fashion_mnist', 'flowers'):
    if name in effort.sources or name != 'flowers':
      default = load_recipe(f'configs/mini.py:ViT-S,{name}').data.train
      open_source(effort.sources.get(name, default), 'train')
