"""Runs of the paper's experiments in miniature, on Fashion-MNIST, digits and photos of flowers.

The sizes and the recipe are those of configs/mini.py. Runs that several experiments share are
trained once.
"""

import dataclasses
from collections.abc import Callable

from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.paper.runs import ExperimentRun, repeat_over_seeds
from vit_jax.recipes import load_recipe

# Images of Fashion-MNIST in configs/mini.py. A run sees the smallest part 38 times, and all images
# 5 times.
MINI_TRAIN_IMAGES = 4000
MINI_DATA_FRACTIONS = {'1/8': 8, '1/4': 4, '1/2': 2, '1': 1}
# Accuracy on digits of features learned from Fashion-MNIST, with five examples of each digit.
MINI_FEWSHOT_METRIC = 'digits_5shot'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MiniEffort:
  """The amount of training in the miniatures."""

  step_factor: float = 1.0  # Multiplies the steps of every run.
  max_runs: int = 0  # Runs of each experiment; the others are skipped. 0 means all.
  seeds: tuple[int, ...] = (0, 1, 2)
  # folder:PATH of photographs in class folders, such as TensorFlow's flower_photos. '' skips them.
  photos: str = ''


def _mini_pretrain_run(
  effort: MiniEffort, model: str, row: str, column: str, *, fraction: str = '1', **settings
) -> ExperimentRun:
  """Return the run of a model of configs/mini.py on a fraction of Fashion-MNIST.

  In the names of `settings`, '__' stands for a dot.
  """
  settings = {name.replace('__', '.'): value for name, value in settings.items()}
  config = f'configs/mini.py:{model},fashion_mnist'
  if fraction != '1':
    settings['data.split'] = f'train[:{MINI_TRAIN_IMAGES // MINI_DATA_FRACTIONS[fraction]}]'
  measures = ('accuracy', MINI_FEWSHOT_METRIC)
  return ExperimentRun(
    row=row,
    column=column,
    config=config,
    settings=_scale_steps(effort, config) | settings,
    measures=measures,
  )


def _scale_steps(effort: MiniEffort, config: str) -> dict[str, object]:
  """Return the setting of the scaled number of steps, at least 3; none if the factor is 1."""
  if effort.step_factor == 1:
    return {}
  return {'steps': _scaled(load_recipe(config).steps, effort)}


def _scaled(steps: int, effort: MiniEffort) -> int:
  """Return the scaled number of steps, at least 3."""
  return max(3, round(steps * effort.step_factor))


def _data_size_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Experiment 2, as in Figures 3 and 4: accuracy against the number of training images.

  Two models of equal compute, and a larger one.
  """
  runs = [
    _mini_pretrain_run(effort, model, model, fraction, fraction=fraction)
    for model in ('ViT-M', 'R-M')
    for fraction in MINI_DATA_FRACTIONS
  ]
  larger = [
    _mini_pretrain_run(effort, 'ViT-L', 'ViT-L', fraction, fraction=fraction)
    for fraction in MINI_DATA_FRACTIONS
  ]
  return repeat_over_seeds(runs, effort.seeds) + repeat_over_seeds(larger, effort.seeds[:1])


def _scaling_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Experiment 3, as in Table 6 and Figure 5: accuracy of three families against compute."""
  medium = [
    _mini_pretrain_run(effort, model, model, 'Fashion-MNIST')
    for model in ('ViT-M', 'R-M', 'R+ViT-M')
  ]
  others = [
    _mini_pretrain_run(effort, model, model, 'Fashion-MNIST')
    for model in ('ViT-S', 'ViT-L', 'R-L', 'R+ViT-L')
  ]
  return repeat_over_seeds(medium, effort.seeds) + repeat_over_seeds(others, effort.seeds[:1])


def _optimizer_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """ResNets pre-trained with Adam and with SGD, as in Table 7."""
  sgd = {'optim__name': 'sgd', 'optim__lr': 0.1, 'optim__weight_decay': 1e-3}
  kinds = {'Adam': {}, 'SGD': sgd}
  runs = [
    _mini_pretrain_run(effort, 'R-M', 'Fashion-MNIST', f'R-M {kind}', **settings)
    for kind, settings in kinds.items()
  ]
  return repeat_over_seeds(runs, effort.seeds)


def _position_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Position embeddings by their kind and by where they are added, as in Table 8."""
  kinds = {
    'none': 'none',
    '1-D learned': 'learned',
    '2-D learned': 'learned2d',
    'relative': 'relative',
  }
  places = {'Stem only': 'stem', 'Every layer': 'every', 'Every layer shared': 'shared'}
  runs = []
  for row, kind in kinds.items():
    for column, place in places.items() if kind.startswith('learned') else [('Stem only', 'stem')]:
      changed = {'model__position': kind, 'model__position_at': place}
      default = {'model__position': 'learned', 'model__position_at': 'stem'}
      changed = {name: value for name, value in changed.items() if value != default[name]}
      runs.append(_mini_pretrain_run(effort, 'ViT-M', row, column, **changed))
  return repeat_over_seeds(runs, effort.seeds)


def _pooling_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """A class token and the mean of the patches, as in Figure 9.

  The mean is trained at the learning rate of the class token and at less than half of it.
  """
  kinds = {
    'CLS lr=4e-3': {},
    'GAP lr=4e-3': {'model__pool': 'gap'},
    'GAP lr=1.5e-3': {'model__pool': 'gap', 'optim__lr': 1.5e-3},
  }
  clock = {'eval_every': '25%', 'probe_every': '25%'}
  runs = [
    _mini_pretrain_run(effort, 'ViT-M', name, 'Fashion-MNIST', **settings, **clock)
    for name, settings in kinds.items()
  ]
  return repeat_over_seeds(runs, effort.seeds)


# Fine-tuning: SGD at learning rate 0.03 without weight decay, as in Table 4. {name: (data,
# settings)}.
_TRANSFER_SGD = {
  'optim.name': 'sgd',
  'optim.lr': 0.03,
  'optim.schedule': 'cosine',
  'optim.weight_decay': 0.0,
  'optim.lr_end': 0.0,
}
_MINI_TRANSFERS = {
  'digits': ('digits', {'data.batch': 48, 'steps': 150}),
  'digits at 64 px': ('digits', {'data.batch': 48, 'steps': 150, 'data.size': (64, 64)}),
  'Fashion-MNIST at 32 px': ('fashion_mnist', {'steps': 100}),
  'Fashion-MNIST at 64 px': ('fashion_mnist', {'steps': 100, 'data.size': (64, 64)}),
  'flowers at 64 px': ('flowers', {'data.batch': 48, 'steps': 150, 'data.size': (64, 64)}),
}


def _transfer_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Experiment 1, as in Tables 2, 5 and 9: fine-tuning at two resolutions.

  The models are pre-trained on an eighth of the images and on all.
  """
  runs = []
  for seed in effort.seeds[:1]:
    for model in ('ViT-M', 'R-M', 'R+ViT-M'):
      for fraction in ('1/8', '1'):
        (start,) = repeat_over_seeds(
          [_mini_pretrain_run(effort, model, model, fraction, fraction=fraction)], (seed,)
        )
        runs += [
          _mini_finetune_run(effort, start, fraction, name)
          for name in _MINI_TRANSFERS
          if effort.photos or 'flowers' not in name
        ]
  return runs


def _mini_finetune_run(
  effort: MiniEffort, start: ExperimentRun, fraction: str, name: str
) -> ExperimentRun:
  """Return the run that fine-tunes `start` on an entry of _MINI_TRANSFERS."""
  data, settings = _MINI_TRANSFERS[name]
  settings = settings | _TRANSFER_SGD | {'probes': (), 'seed': start.settings['seed']}
  settings |= {'steps': _scaled(settings['steps'], effort)}
  settings |= {'data.train': effort.photos} if data == 'flowers' else {}
  config = f'configs/mini.py:{start.row},{data}'
  return ExperimentRun(
    row=f'{start.row} from {fraction}', column=name, config=config, settings=settings, init=start
  )


# Self-supervision: all images without labels, in 49 patches each; then the labels of the first 500
# images.
_MASKED_PATCH_SETTINGS = {
  'model.variant': 'Ti/4',
  'model.pool': 'gap',
  'data.size': (28, 28),
  'probes': (),
}
_FEW_LABELS_SETTINGS = {'data.split': 'train[:500]', 'data.batch': 48, 'steps': 150}


def _masked_patch_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Self-supervision, as in §4.6: few labels after masked patch prediction, and from scratch.

  Both are fine-tuned for the same number of steps.
  """
  config, column = 'configs/mini.py:ViT-S,fashion_mnist', 'Fashion-MNIST, 500 labels'
  mask = {'mask.target': 'colour', 'optim.weight_decay': 0.0, 'steps': _scaled(600, effort)}
  mask = _MASKED_PATCH_SETTINGS | mask
  few = _MASKED_PATCH_SETTINGS | _FEW_LABELS_SETTINGS
  few |= {'steps': _scaled(few['steps'], effort)}
  runs = []
  for seed in effort.seeds:
    start = ExperimentRun(
      row='ViT-S', column='masked patches', config=config, settings=mask | {'seed': seed}
    )
    for row, init in (('masked patches first', start), ('from scratch', '')):
      runs.append(
        ExperimentRun(
          row=row, column=column, config=config, settings=few | {'seed': seed}, init=init
        )
      )
  return runs


def select_mini_runs(experiment: str, effort: MiniEffort) -> list[ExperimentRun]:
  """Return the runs of an experiment, at most `effort.max_runs` of them."""
  runs = MINI_EXPERIMENTS[experiment](effort)
  return runs[: effort.max_runs] if effort.max_runs else runs


MINI_EXPERIMENTS: dict[str, Callable[[MiniEffort], list[ExperimentRun]]] = {
  'data_size': _data_size_runs,
  'scaling': _scaling_runs,
  'optimizers': _optimizer_runs,
  'positions': _position_runs,
  'pooling': _pooling_runs,
  'transfer': _transfer_runs,
  'masked_patches': _masked_patch_runs,
}


def check_photos(effort: MiniEffort):
  """Raise UserError if the source of photographs cannot be opened."""
  if effort.photos and not effort.photos.startswith('folder:'):
    raise UserError(f'--photos={effort.photos}: expected folder:PATH')
  if effort.photos:
    open_source(effort.photos, 'train')
