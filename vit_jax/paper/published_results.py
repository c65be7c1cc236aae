"""Results that others published, each with the run here that should match it.

A result is met if the mean of our accuracies over the seeds is at least the target minus the
tolerance. tables/published_results.csv quotes the results without such a run.

The runs on CIFAR read TFDS, or the source in $VIT_JAX_CIFAR10 and $VIT_JAX_CIFAR100, such as
folder:cifar10 with the folders train/CLASS and test/CLASS.
"""

import csv
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

from vit_jax.paper.runs import ExperimentRun

FASHION_MNIST = 'idx:/usr/share/datasets/fashion-mnist'  # Debian's dataset-fashion-mnist.
_QUOTED = Path(__file__).parent / 'tables' / 'published_results.csv'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedResult:
  """A published accuracy, and how to reproduce it."""

  title: str
  target: float  # Percent.
  data: str  # The data set by its usual name.
  source: str
  tolerance: float = 0.0  # Points.
  seeds: tuple[int, ...] = (0, 1, 2)
  device: str = 'cpu'  # What the budget is for: cpu (two cores), gpu (one H100), tpu.
  minutes: float = 0.0  # Of one seed on the device.
  make_run: Callable[[], ExperimentRun] | None = None
  needs: str = ''  # What a result without `make_run` needs.
  differences: str = ''  # From the recipe of the source: what ours lacks, or has instead.


def _make_run(config: str, *, init: ExperimentRun | str = '', **settings):
  """Return a function that returns the run. In the names of `settings`, '__' is a dot."""
  named = {name.replace('__', '.'): value for name, value in settings.items()}
  return lambda: ExperimentRun(row='', column='', config=config, settings=named, init=init)


def _build_cifar_run(recipe: str, data: str) -> ExperimentRun:
  """Return the run of a recipe of configs/cifar.py, on the data of the environment if it is set."""
  source = os.environ.get(f'VIT_JAX_{data.upper()}')
  settings = {'data.train': source} if source else {}
  return ExperimentRun(row='', column='', config=f'cifar:{recipe},{data}', settings=settings)


def _make_cifar_result(recipe: str, data: str = 'cifar10', **fields) -> PublishedResult:
  """Return a result on CIFAR for one GPU."""
  return PublishedResult(
    data={'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}[data],
    device='gpu',
    make_run=functools.partial(_build_cifar_run, recipe, data),
    **fields,
  )


_SMALL_VIT = {
  'data__train': FASHION_MNIST,
  # Not crop=random, whose training images are larger than those of the evaluation.
  'data__crop': 'simple',
  'eval_every': '25%',
  'save_every': '5%',
  'steps': 0,
}
_SCRATCH_VIT = {
  'model__variant': 'Ti/4', 'model__width': 64, 'model__depth': 6, 'model__mlp': 128,
  'model__pool': 'token', 'model__gelu': 'erf', 'model__dropout': 0.1,
  'optim__lr': 5e-4, 'optim__lr_end': 1e-5, 'optim__warmup': '5%', 'optim__weight_decay': 1e-3,
  'optim__grad_clip_norm': 0.0, 'data__batch': 128, 'mixup': 0.0,
}  # fmt: skip
_RUNS = {
  'fashion-mnist-svc': PublishedResult(
    title='the best classifier that is not a network: a support vector machine',
    target=89.7,
    data='Fashion-MNIST',
    source='benchmark of zalandoresearch/fashion-mnist',
    minutes=15,
    make_run=_make_run('quickstart', **_SMALL_VIT, epochs=12.0),
  ),
  'fashion-mnist-vit-4-blocks': PublishedResult(
    title='a ViT of four blocks or fewer',
    target=90.77,
    data='Fashion-MNIST',
    source='SunnyCodeverse333/Fashion-MNIST-Classification-Vision-Transformer',
    seeds=(0,),
    minutes=60,
    make_run=_make_run('quickstart', **_SMALL_VIT, epochs=40.0),
  ),
  'fashion-mnist-vit-200-epochs': PublishedResult(
    title='a ViT of width 64 with 6 blocks, 200 epochs',
    target=92.3,
    data='Fashion-MNIST',
    source='s-chh/PyTorch-Scratch-Vision-Transformer-ViT README',
    seeds=(0,),
    minutes=300,
    make_run=_make_run('quickstart', **_SMALL_VIT | _SCRATCH_VIT, epochs=200.0),
    differences='shifts of images by up to 4 pixels for 2',
  ),
  'digits-svc': PublishedResult(
    title='handwritten digits: a support vector machine (ours is pre-trained on Fashion-MNIST)',
    target=97.0,
    data='digits of scikit-learn',
    source='the example "Recognizing hand-written digits" of scikit-learn',
    minutes=1,
    make_run=_make_run(
      'quickstart_finetune', init=ExperimentRun(row='', column='', config='quickstart')
    ),
  ),
}

_NO_AUTOAUGMENT = 'RandAugment as in timm for AutoAugment'
_VIT_512 = (
  'AdamW at 5e-4 for Adam at 1e-4, RandAugment at magnitude 9 for 14, stochastic depth for '
  'dropout, label smoothing'
)
_CIFAR_RUNS = {
  'scratch-vit-cifar10': _make_cifar_result(
    'scratch',
    title='a ViT of width 128 with 6 blocks, 200 epochs',
    target=86.3,
    source='s-chh/PyTorch-Scratch-Vision-Transformer-ViT README, with RandAugment',
    minutes=4,
    differences="timm's RandAugment at magnitude 3 for torchvision's at 9 of 30",
  ),
  'vit-lite-cifar10': _make_cifar_result(
    'vit_lite',
    title='ViT-Lite-7/4, 200 epochs',
    target=91.38,
    source='Compact-Transformers, examples/README.md',
    minutes=6,
    differences=f'{_NO_AUTOAUGMENT}, no dropout of attention weights (0.1 there)',
  ),
  'vit-lite-cifar100': _make_cifar_result(
    'vit_lite',
    'cifar100',
    title='ViT-Lite-7/4, 200 epochs',
    target=69.75,
    source='Compact-Transformers, examples/README.md',
    minutes=6,
    differences=f'{_NO_AUTOAUGMENT}, no dropout of attention weights (0.1 there)',
  ),
  'spt-lsa-vit-cifar10': _make_cifar_result(
    'spt_lsa',
    title='the plain ViT of SPT_LSA_ViT, 100 epochs, three copies of an image',
    target=93.58,
    source='SPT_LSA_ViT README',
    minutes=8,
    differences=(
      f'{_NO_AUTOAUGMENT}, 300 epochs without copies, batch 256 for 128, every batch mixed for '
      'half of them, erasing by noise. SPT and LSA are not in this row of theirs, and not here'
    ),
  ),
  'vit-cifar-cifar10': _make_cifar_result(
    'vit_cifar',
    title='ViT of 6.3 M parameters, 200 epochs',
    target=90.92,
    source='omihub777/ViT-CIFAR README',
    minutes=8,
    differences=(
      f'{_NO_AUTOAUGMENT}, AdamW with decay 0.05 for Adam with an L2 penalty of 5e-5, stochastic '
      'depth for dropout, one GELU in a block for two, attention scores are scaled'
    ),
  ),
  'cifar10-94-fast': _make_cifar_result(
    'fast',
    title='94 % as fast as possible, mean of five seeds',
    target=94.0,
    source='the goal of airbench, which trains CNNs; no ViT record was found',
    seeds=(0, 1, 2, 3, 4),
    minutes=9,
    differences='a ViT of 10.7 M parameters of our own, with Muon, for a CNN',
  ),
  'kentaroy-cifar10-500': _make_cifar_result(
    'vit_512_short',
    title='ViT of width 512 with patches of 4, 500 epochs',
    target=85.0,
    source='kentaroy47/vision-transformers-cifar10 README',
    minutes=4,
    differences=f'100 epochs, {_VIT_512}',
  ),
  'kentaroy-cifar10-1000': _make_cifar_result(
    'vit_512_long',
    title='ViT of width 512 with patches of 4, 1,000 epochs',
    target=89.0,
    source='kentaroy47/vision-transformers-cifar10 README',
    minutes=8,
    differences=f'200 epochs, {_VIT_512}',
  ),
}


def _read_quoted() -> dict[str, PublishedResult]:
  """Return the results of the CSV."""
  with _QUOTED.open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  return {
    row.pop('name'): PublishedResult(**row | {'target': float(row['target'])}) for row in rows
  }


PUBLISHED_RESULTS = _RUNS | _CIFAR_RUNS | _read_quoted()
