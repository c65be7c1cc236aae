"""VTAB-1k as in the paper (arXiv 2010.11929, Table 4, App. B.1.1): one setting for all 19 tasks."""

import numpy as np

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.sources import open_source
from vit_jax.data.vtab import VTAB_TASKS
from vit_jax.errors import UserError, did_you_mean

_VTAB_STEPS = 2_500
_VTAB_LR = 0.01
_VTAB_BATCH = 512
_VTAB_WARMUP = '20%'  # The 500 of 2,500 steps of the released code; the table has no warmup.
# Fraction of an image's area. BiT resizes to 448 pixels and crops 384 (arXiv 1912.11370).
_VTAB_CROP_AREA = (384 / 448) ** 2


def vtab_config(
  task: str,
  *,
  model: ModelConfig,
  size: tuple[int, int],
  steps: int = _VTAB_STEPS,
  lr: float = _VTAB_LR,
  batch: int = _VTAB_BATCH,
  **data,
) -> Config:
  """Return the config that fine-tunes on the 1,000 images of a task.

  The run is evaluated on the test split of the task. `task` is a key of `VTAB_TASKS`, `size` the
  height and width of the images in pixels, and `data` are further fields of `DataConfig`. Raises
  UserError if the task is unknown.
  """
  if task not in VTAB_TASKS:
    raise UserError(f'VTAB has no task {task!r}.{did_you_mean(task, VTAB_TASKS)}')
  augmentations = VTAB_TASKS[task].augmentations
  crop = {'crop': 'resize'}
  if 'crop' in augmentations:
    crop = {'crop': 'inception', 'crop_area': (_VTAB_CROP_AREA, _VTAB_CROP_AREA)}
  return Config(
    data=DataConfig(
      train=f'vtab:{task}',
      split='train+val',
      eval_split='test',
      batch=batch,
      size=size,
      flip='flip' in augmentations,
      **crop,
      **data,
    ),
    model=model,
    optim=OptimConfig(
      name='sgd',
      lr=lr,
      warmup=_VTAB_WARMUP,
      b1=0.9,
      momentum_dtype='bfloat16',
      grad_clip_norm=1.0,
    ),
    steps=steps,
    eval_every='0',
    save_every='20%',
  )


def check_vtab_data(tasks: list[str], dir: str):
  """Check that the data of all tasks are in `dir`. Raises UserError, which says how to get them."""
  missing = {}
  for task in tasks:
    try:
      open_source(f'vtab:{task}', 'train', dir=dir)
    except UserError as error:
      missing[task] = error
  if missing:
    names, first = ', '.join(missing), next(iter(missing.values()))
    raise UserError(f'{len(missing)} of {len(tasks)} tasks have no data here ({names}): {first}')


def mean_by_group(accuracies: dict[str, float]) -> dict[str, float]:
  """Return the mean accuracy of each group of tasks: {'natural': …, …, 'all': …}.

  A group with a task that is not in `accuracies` is left out.
  """
  groups = {}
  for name, task in VTAB_TASKS.items():
    groups.setdefault(task.group, []).append(name)
  groups['all'] = list(VTAB_TASKS)
  return {
    group: float(np.mean([accuracies[name] for name in names]))
    for group, names in groups.items()
    if accuracies.keys() >= set(names)
  }
