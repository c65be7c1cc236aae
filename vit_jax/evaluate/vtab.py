"""VTAB-1k as the paper ran it (arXiv 2010.11929, Table 4, App. B.1.1): one setting for all 19 tasks, 2,500 steps at 384 px."""

import numpy as np

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.sources import open_source
from vit_jax.data.vtab import VTAB_TASKS
from vit_jax.errors import UserError, did_you_mean

_VTAB_STEPS, _VTAB_LR, _VTAB_BATCH = 2_500, 0.01, 512
_VTAB_WARMUP = '20%'  # The released code's 500 of 2,500; the table has none.
_VTAB_CROP_AREA = (
  384 / 448
) ** 2  # Of an image's area: BiT resizes to 448 pixels and cuts 384 out (arXiv 1912.11370).


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
  """Fine-tuning on the 1,000 images of a task, to be judged on its whole test split. UserError for a task that is not there."""
  if task not in VTAB_TASKS:
    raise UserError(f'VTAB has no task {task!r}.{did_you_mean(task, VTAB_TASKS)}')
  crop = {'crop': 'resize'}
  if 'crop' in VTAB_TASKS[task].augmentations:
    crop = {'crop': 'inception', 'crop_area': (_VTAB_CROP_AREA, _VTAB_CROP_AREA)}
  flip = 'flip' in VTAB_TASKS[task].augmentations
  source = {'train': f'vtab:{task}', 'split': 'train+val', 'eval_split': 'test'}
  return Config(
    data=DataConfig(**source, **crop, batch=batch, size=size, flip=flip, **data),
    model=model,
    optim=OptimConfig(
      name='sgd', lr=lr, warmup=_VTAB_WARMUP, b1=0.9, momentum_dtype='bfloat16', grad_clip_norm=1.0
    ),
    steps=steps,
    eval_every='0',
    save_every='20%',
  )


def check_vtab_data(tasks: list[str], dir: str):
  """UserError where the data of a task are not here: which, and what to do about the first."""
  missing = {}
  for task in tasks:
    try:
      open_source(f'vtab:{task}', 'train', dir=dir)
    except UserError as error:
      missing[task] = error
  if missing:
    first = next(iter(missing.values()))
    raise UserError(
      f'{len(missing)} of {len(tasks)} tasks have no data here ({", ".join(missing)}): {first}'
    )


def mean_by_group(accuracies: dict[str, float]) -> dict[str, float]:
  """{'natural': …, 'specialized': …, 'structured': …, 'all': …} of the accuracy of each task; groups with all of theirs."""
  groups = dict.fromkeys(task.group for task in VTAB_TASKS.values())
  members = {
    group: [name for name, task in VTAB_TASKS.items() if task.group == group] for group in groups
  } | {'all': list(VTAB_TASKS)}
  whole = {group: names for group, names in members.items() if accuracies.keys() >= set(names)}
  return {
    group: float(np.mean([accuracies[name] for name in names])) for group, names in whole.items()
  }
