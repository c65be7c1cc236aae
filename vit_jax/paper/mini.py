"""The paper's experiments in miniature: which runs, on Fashion-MNIST, digits and photographs of flowers.

Sizes and recipe are configs/mini.py's. Runs that several experiments share are done once.
"""

import dataclasses
from collections.abc import Callable

from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.paper.runs import ExperimentRun, repeat_over_seeds
from vit_jax.recipes import load_recipe

MINI_TRAIN_IMAGES = 4000  # Of Fashion-MNIST, as configs/mini.py takes: a run sees the smallest part 38 times, and all of them 5 times.
MINI_DATA_FRACTIONS = {'1/8': 8, '1/4': 4, '1/2': 2, '1': 1}
MINI_FEWSHOT_METRIC = 'digits_5shot'  # Of a representation that Fashion-MNIST taught: the accuracy on digits, from five of each.
FLOWERS = 'folder:photos'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MiniEffort:
  """How much of it is done: a factor on all steps, and the seeds of which the deviation is told."""

  steps: float = 1.0
  runs: int = 0  # Of each experiment the first so many; 0 means all.
  seeds: tuple[int, ...] = (0, 1, 2)
  photos: str = ''  # A folder of photographs in class folders, such as TensorFlow's flower_photos; '' goes without.


def _mini_pretrain_run(
  effort: MiniEffort, model: str, row: str, column: str, *, share: str = '1', **settings
) -> ExperimentRun:
  """Of a model of configs/mini.py on a share of Fashion-MNIST; `settings` have __ for a dot."""
  settings = {name.replace('__', '.'): value for name, value in settings.items()}
  config = f'configs/mini.py:{model},fashion_mnist'
  if share != '1':
    settings['data.split'] = f'train[:{MINI_TRAIN_IMAGES // MINI_DATA_FRACTIONS[share]}]'
  measures = ('accuracy', MINI_FEWSHOT_METRIC)
  return ExperimentRun(
    row=row,
    column=column,
    config=config,
    settings=_scale_steps(effort, config) | settings,
    measures=measures,
  )


def _scale_steps(effort: MiniEffort, config: str) -> dict[str, object]:
  """The steps that are left of the config's; at least 3."""
  return (
    {} if effort.steps == 1 else {'steps': max(3, round(load_recipe(config).steps * effort.steps))}
  )


def _data_size_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Experiment 2, as Figures 3 and 4: models of one compute, and a larger one, against the size of what they learn from."""
  runs = [
    _mini_pretrain_run(effort, model, model, share, share=share)
    for model in ('ViT-M', 'R-M')
    for share in MINI_DATA_FRACTIONS
  ]
  larger = [
    _mini_pretrain_run(effort, 'ViT-L', 'ViT-L', share, share=share)
    for share in MINI_DATA_FRACTIONS
  ]
  return repeat_over_seeds(runs, effort.seeds) + repeat_over_seeds(larger, effort.seeds[:1])


def _scaling_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Experiment 3, as Table 6 and Figure 5: three families against the compute of their pre-training."""
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
  """As Table 7: ResNets pre-trained with Adam and with SGD."""
  sgd = {'optim__name': 'sgd', 'optim__lr': 0.1, 'optim__weight_decay': 1e-3}
  kinds = {'Adam': {}, 'SGD': sgd}
  runs = [
    _mini_pretrain_run(effort, 'R-M', 'Fashion-MNIST', f'R-M {kind}', **settings)
    for kind, settings in kinds.items()
  ]
  return repeat_over_seeds(runs, effort.seeds)


def _position_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """As Table 8: position embeddings, by their kind and by where they are added."""
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
  """As Figure 9: a class token, and the mean of the patches at its learning rate and at less than half of it."""
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


# Transfer: data set, its settings in fine-tuning. SGD at 0.03 without weight decay, as Table 4 has it.
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
  """Experiment 1, as Tables 2, 5 and 9: fine-tuning what was pre-trained on a part and on all, at two resolutions."""
  runs = []
  for seed in effort.seeds[:1]:
    for model in ('ViT-M', 'R-M', 'R+ViT-M'):
      for share in ('1/8', '1'):
        (start,) = repeat_over_seeds(
          [_mini_pretrain_run(effort, model, model, share, share=share)], (seed,)
        )
        runs += [
          _mini_finetune_run(effort, start, share, name)
          for name in _MINI_TRANSFERS
          if effort.photos or 'flowers' not in name
        ]
  return runs


def _mini_finetune_run(
  effort: MiniEffort, start: ExperimentRun, share: str, name: str
) -> ExperimentRun:
  """`start` on the transfer of that name."""
  data, settings = _MINI_TRANSFERS[name]
  settings = settings | _TRANSFER_SGD | {'probes': (), 'seed': start.settings['seed']}
  settings |= {'steps': max(3, round(settings['steps'] * effort.steps))}
  settings |= {'data.train': effort.photos} if data == 'flowers' else {}
  config = f'configs/mini.py:{start.row},{data}'
  return ExperimentRun(
    row=f'{start.row} from {share}', column=name, config=config, settings=settings, init=start
  )


# Self-supervision: all images without their labels, in patches of which there are 49, and then the labels of the first 500.
_MASKED_PATCH_SETTINGS = {
  'model.variant': 'Ti/4',
  'model.pool': 'gap',
  'data.size': (28, 28),
  'probes': (),
}
_FEW_LABELS_SETTINGS = {'data.split': 'train[:500]', 'data.batch': 48, 'steps': 150}


def _masked_patch_runs(effort: MiniEffort) -> list[ExperimentRun]:
  """Self-supervision, as §4.6: fine-tuning what masked patches taught, and as many steps from scratch, on few labels."""
  config, column = 'configs/mini.py:ViT-S,fashion_mnist', 'Fashion-MNIST, 500 labels'
  times = lambda settings: settings | {'steps': max(3, round(settings['steps'] * effort.steps))}
  mask = times(
    _MASKED_PATCH_SETTINGS | {'mask.target': 'colour', 'optim.weight_decay': 0.0, 'steps': 600}
  )
  few = times(_MASKED_PATCH_SETTINGS | _FEW_LABELS_SETTINGS)
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
  """The runs of an experiment, as many as the effort says."""
  runs = MINI_EXPERIMENTS[experiment](effort)
  return runs[: effort.runs] if effort.runs else runs


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
  """UserError where the folder of photographs is none."""
  if effort.photos and not effort.photos.startswith('folder:'):
    raise UserError(f'--photos={effort.photos}: expected folder:PATH')
  if effort.photos:
    open_source(effort.photos, 'train')
