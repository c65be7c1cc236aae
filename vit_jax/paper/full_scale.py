"""Runs of the paper's experiments at full scale (arXiv 2010.11929).

The recipes are those of Tables 3 and 4 and of the text. JFT-300M is not public: `replace_jft`
replaces it with ImageNet-21k and leaves the recipe unchanged.
"""

import dataclasses
from collections.abc import Callable, Iterable

from vit_jax.data.vtab import VTAB_TASKS
from vit_jax.models.families import family_name
from vit_jax.paper.published import read_published_table
from vit_jax.paper.runs import ExperimentRun, init_chain, repeat_over_seeds
from vit_jax.recipes import load_sweep_rates

JFT, IMAGENET_21K, IMAGENET_1K = 'JFT-300M', 'ImageNet-21k', 'ImageNet'
_PRETRAIN_CONFIG = 'configs/pretrain.py'
FINETUNE_CONFIG = 'configs/finetune.py'
_HYPERRULE_CONFIG = 'configs/bit_finetune.py'
_DATASET_ARGUMENTS = {JFT: 'jft', IMAGENET_21K: 'imagenet21k', IMAGENET_1K: 'imagenet'}
_STANDIN_SETTINGS = {
  'data.train': 'folder:imagenet21k',
  'data.split': 'train[51200:]',
  'data.eval_split': 'train[:25600]',
}

# Table 4, App. B.1.1. {data set: (argument of configs/finetune.py, start of the part of the
# training split that the sweep holds out)}.
TRANSFER_DATASETS = {
  'CIFAR-10': ('cifar10', '98%'),
  'CIFAR-100': ('cifar100', '98%'),
  'ImageNet': ('imagenet', '99%'),
  'Oxford Flowers-102': ('flowers', '90%'),
  'Oxford-IIIT-Pets': ('pets', '90%'),
}
# Figures 4, 8, 9 and 13 and Table 8: ImageNet with five images for each class.
_FEWSHOT_EVALS = ('fewshot:tfds:imagenet2012',)
_FEWSHOT_MEASURES = ('imagenet2012_5shot',)


def _pretrain_run(
  model: str, data: str, epochs: int = 0, /, *, row: str = '', column: str = '', **settings
) -> ExperimentRun:
  """Return the run of a row of Table 3 with changed settings.

  In the names of `settings`, '__' stands for a dot. Table 3 has no row for H/14 on ImageNet-21k; it
  uses that of L/16.
  """
  settings = {name.replace('__', '.'): value for name, value in settings.items()}
  if (model, data) == ('H/14', IMAGENET_21K):
    model, settings = 'L/16', {'model.variant': 'H/14'} | settings
  argument = ','.join([model, _DATASET_ARGUMENTS[data], *([str(epochs)] if epochs else [])])
  return ExperimentRun(
    row=row or model,
    column=column or data,
    config=f'{_PRETRAIN_CONFIG}:{argument}',
    settings=settings,
  )


def _finetune_runs(
  start: ExperimentRun | str, model: str, target: str, *, row: str, column: str, **settings
) -> list[ExperimentRun]:
  """Return three seeds of Table 4's recipe, at the best learning rate of a sweep.

  ResNets use the BiT-HyperRule where that is better. The paper does not say on which images it
  compares the two; here it is the held-out part. The three seeds train on all training images.
  """
  data, held_out = TRANSFER_DATASETS[target]
  settings = {name.replace('__', '.'): value for name, value in settings.items()}
  real = {'probes': ('real',)} if target == IMAGENET_1K else {}
  run = ExperimentRun(
    row=row,
    column=column,
    config=f'{FINETUNE_CONFIG}:{model},{data}',
    settings=real | settings,
    init=start,
    measures=('accuracy', 'real/imagenet2012_top1') if real else ('accuracy',),
    learning_rates=load_sweep_rates(f'{FINETUNE_CONFIG}:{model},{data}'),
    held_out_from=held_out,
    alternative_config=f'{_HYPERRULE_CONFIG}:{model},{data}'
    if family_name(model) == 'BiT ResNet'
    else '',
  )
  return repeat_over_seeds([run])


def _fewshot_run(
  model: str, data: str, epochs: int = 0, /, *, row: str, column: str, **settings
) -> ExperimentRun:
  """Return a pre-training run that is measured by ImageNet 5-shot accuracy."""
  return dataclasses.replace(
    _pretrain_run(model, data, epochs, row=row, column=column, probes=_FEWSHOT_EVALS, **settings),
    measures=_FEWSHOT_MEASURES,
  )


def _table_2_pretrain_runs() -> dict[str, ExperimentRun]:
  """Return the models by their columns in Tables 2 and 9."""
  return {
    'ViT-H/14 (JFT)': _pretrain_run('H/14', JFT),
    'ViT-L/16 (JFT)': _pretrain_run('L/16', JFT, 14),
    'ViT-L/16 (I21k)': _pretrain_run('L/16', IMAGENET_21K),
  }


def table_2_runs() -> list[ExperimentRun]:
  """Table 2: fine-tuning, with Table 9 for VTAB.

  On ImageNet at 512 px (L/16) or 518 px (H/14), with parameters averaged at decay 0.9999.
  """
  runs = []
  for column, start in _table_2_pretrain_runs().items():
    model, side = ('H/14', 518) if 'H/14' in column else ('L/16', 512)
    for target in TRANSFER_DATASETS:
      more = {'data__size': (side, side), 'optim__ema': 0.9999} if target == IMAGENET_1K else {}
      runs += _finetune_runs(start, model, target, row=target, column=column, **more)
  return runs + table_9_runs()


def table_5_runs(sets: Iterable[str] = (IMAGENET_1K, IMAGENET_21K, JFT)) -> list[ExperimentRun]:
  """Table 5: every model of Table 1 pre-trained on every data set, fine-tuned at 384 px."""
  runs = []
  for data in sets:
    for model in ('B/16', 'B/32', 'L/16', 'L/32', 'H/14'):
      if (model, data) != ('H/14', IMAGENET_1K):
        start = _pretrain_run(model, data, 14 if (model, data) == ('L/16', JFT) else 0)
        runs += [
          run
          for target in TRANSFER_DATASETS
          for run in _finetune_runs(
            start, model, target, row=f'{data}, {target}', column=f'ViT-{model}'
          )
        ]
  return runs


def table_6_runs() -> list[ExperimentRun]:
  """Table 6, the scaling study: every model pre-trained on JFT-300M and fine-tuned."""
  runs = []
  for row in read_published_table('table6'):
    model, name = parse_paper_variant(row['Model']), f'{row["Model"]}, {row["Epochs"]} epochs'
    start = _pretrain_run(model, JFT, int(row['Epochs']))
    runs += [
      run
      for target in TRANSFER_DATASETS
      for run in _finetune_runs(start, model, target, row=name, column=target)
    ]
  return runs


def parse_paper_variant(model: str) -> str:
  """Return our name of a model of the paper.

  'R50x1+ViT-B/16' -> 'R50+B/16', 'ResNet50x1' -> 'R50x1', 'AxialResNet50x1' -> 'AxialR50x1'.
  'AxialViT-B/16' is unchanged.
  """
  plain = model.replace('ResNet', 'R').replace('R50x1+', 'R50+')
  return plain if plain.startswith('Axial') else plain.replace('ViT-', '')


def table_7_runs() -> list[ExperimentRun]:
  """Table 7: ResNets pre-trained with Adam, and with SGD and BiT's settings."""
  runs = []
  for model, title in (('R50x1', 'R50'), ('R152x2', 'R152x2')):
    sgd = ExperimentRun(row=model, column=JFT, config=f'configs/bit_pretrain.py:{model},jft,7')
    for kind, start in {'Adam': _pretrain_run(model, JFT, 7), 'SGD': sgd}.items():
      runs += [
        run
        for target in TRANSFER_DATASETS
        for run in _finetune_runs(start, model, target, row=target, column=f'{title} {kind}')
      ]
  return runs


def table_8_runs() -> list[ExperimentRun]:
  """Table 8: position embeddings of ViT-B/16."""
  kinds = {
    'none': 'none',
    '1-D learned': 'learned',
    '2-D learned': 'learned2d',
    'relative': 'relative',
  }
  places = {'Stem only': 'stem', 'Every layer': 'every', 'Every layer shared': 'shared'}
  return [
    _fewshot_run(
      'B/16', JFT, row=row, column=column, model__position=kind, model__position_at=place
    )
    for row, kind in kinds.items()
    for column, place in places.items()
    if place == 'stem' or kind.startswith('learned')
  ]


def figure_4_runs() -> list[ExperimentRun]:
  """Figure 4: parts of JFT-300M, with the same settings and number of steps for all.

  The paper reports the best step on held-out images.
  """
  models = {
    'ViT-L/16': 'L/16',
    'ViT-L/32': 'L/32',
    'ViT-B/32': 'B/32',
    'ViT-b/32': 'B/32',
    'R50x1 (BiT)': 'R50x1',
    'R152x2 (BiT)': 'R152x2',
  }
  # Every width of B halved, with heads of 64.
  halved = {'model__width': 384, 'model__mlp': 1536, 'model__heads': 6}
  runs = []
  for row, model in models.items():
    for millions in ('9.06', '30.2', '90.6', '302'):
      images = {
        'data__split': f'train[50000:{50_000 + round(float(millions) * 1e6)}]',
        'epochs': 0.0,
        'steps': 518_000,
      }
      images |= {'probe_every': '5%', **(halved if row == 'ViT-b/32' else {})}
      runs.append(_fewshot_run(model, JFT, 7, row=row, column=f'{millions}M', **images))
  return runs


def figure_8_runs() -> list[ExperimentRun]:
  """Figure 8: 8 layers, width 1,024, MLP 2,048 and patches of 32, with one of them scaled.

  The values give the compute that the plot shows.
  """
  base = {'model__depth': 8, 'model__width': 1024, 'model__mlp': 2048, 'model__heads': 16}
  scaled = {
    'Base': [{}],
    'Depth': [{'model__depth': depth} for depth in (2, 4, 16, 25, 50)],
    'Width': [
      {'model__width': width, 'model__heads': width // 64} for width in (448, 704, 1408, 1920)
    ],
    'Width MLP': [{'model__mlp': mlp} for mlp in (4096, 9216)],
    'Patch size': [{'model__variant': f'B/{patch}'} for patch in (56, 28, 16)],
    'All': [
      {'model__depth': 4, 'model__width': 512, 'model__mlp': 1024, 'model__heads': 8},
      {'model__depth': 16, 'model__width': 2048, 'model__mlp': 4096, 'model__heads': 32},
    ],
  }

  def format_settings(settings: dict[str, object]) -> str:
    words = [f'{name.partition("__")[2]} {value}' for name, value in settings.items()]
    return ' '.join(words) or 'base'

  return [
    _fewshot_run('B/32', JFT, row=row, column=format_settings(settings), **base | settings)
    for row, choices in scaled.items()
    for settings in choices
  ]


def figure_9_runs() -> list[ExperimentRun]:
  """Figure 9: a class token and the mean of the patches.

  The paper does not name the model; the accuracy and the learning rate suggest ViT-B/32.
  """
  kinds = {
    'CLS lr=8e-4': ('token', 8e-4),
    'GAP lr=8e-4': ('gap', 8e-4),
    'GAP lr=3e-4': ('gap', 3e-4),
  }
  return [
    _fewshot_run(
      'B/32', JFT, row=name, column='7 epochs', model__pool=pool, optim__lr=lr, probe_every='5%'
    )
    for name, (pool, lr) in kinds.items()
  ]


def figure_10_runs() -> list[ExperimentRun]:
  """Figure 10: three ViT-L/16, whose position embeddings the command `figures` compares."""
  rows = ((7, 2e-4, 0.01), (7, 4e-4, 0.1), (14, 4e-4, 0.1))
  return [
    _pretrain_run(
      'L/16',
      JFT,
      epochs,
      row=f'{epochs} epochs, {lr:g}, {decay:g}',
      optim__lr=lr,
      optim__weight_decay=decay,
    )
    for epochs, lr, decay in rows
  ]


def table_9_runs() -> list[ExperimentRun]:
  """Table 9, VTAB-1k: the models of Table 2 on the 1,000 images of each task, with three seeds."""
  runs = []
  for column, start in _table_2_pretrain_runs().items():
    config = f'{FINETUNE_CONFIG}:{"H/14" if "H/14" in column else "L/16"},vtab/'
    runs += [
      ExperimentRun(row=task.title, column=column, config=config + name, init=start)
      for name, task in VTAB_TASKS.items()
    ]
  return repeat_over_seeds(runs)


def figure_13_runs() -> list[ExperimentRun]:
  """Figure 13: axial models and plain models at seven epochs."""
  models = (
    'AxialViT-B/16',
    'AxialViT-B/32',
    'ViT-B/16',
    'ViT-B/32',
    'ResNet50x1',
    'AxialResNet50x1',
  )
  return [
    _fewshot_run(
      parse_paper_variant(model), JFT, 7, row=model.removesuffix('x1'), column='ImageNet 5-shot'
    )
    for model in models
  ]


def self_supervision_runs() -> list[ExperimentRun]:
  """§4.6: ViT-B/16 fine-tuned on ImageNet after masked patches, from scratch, and after labels."""
  starts = {
    'masked patch prediction on JFT-300M (1M steps)': ExperimentRun(
      row='B/16', column=JFT, config='configs/self_supervised.py:B/16,jft'
    ),
    'none: ImageNet from scratch': _pretrain_run('B/16', IMAGENET_1K),
    'supervised on ImageNet-21k': _pretrain_run('B/16', IMAGENET_21K),
  }
  return [
    run
    for row, start in starts.items()
    for run in _finetune_runs(start, 'B/16', IMAGENET_1K, row=row, column=IMAGENET_1K)
  ]


def make_dataset_filter(
  target: str,
) -> Callable[[Callable[[], list[ExperimentRun]]], Callable[[], list[ExperimentRun]]]:
  """Return a decorator that keeps only the runs of a table that fine-tune on `target`."""
  data = TRANSFER_DATASETS[target][0]
  return lambda runs: lambda: [run for run in runs() if run.config.endswith(f',{data}')]


def replace_jft(run: ExperimentRun) -> ExperimentRun:
  """Return the run with ImageNet-21k in place of JFT-300M, also in the runs that it starts from."""
  start = replace_jft(run.init) if isinstance(run.init, ExperimentRun) else run.init
  on_jft = ',jft' in run.config
  settings = run.settings | (_STANDIN_SETTINGS if on_jft else {})
  return dataclasses.replace(run, init=start, settings=settings)


def uses_jft(runs: Iterable[ExperimentRun]) -> bool:
  """Return whether a run, or one that it starts from, pre-trains on JFT-300M itself."""
  starts = [next(init_chain(run)) for run in runs]
  return any(',jft' in run.config and 'data.train' not in run.settings for run in starts)
