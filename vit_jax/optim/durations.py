"""Durations such as 500, 2ep and 10%, and the number of steps of a run."""

import re

from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError


def parse_duration(text: str, *, name: str, steps: int, epoch: float) -> int:
  """Return the steps of a duration, at least 1, or 0 for '0'.

  '500' is steps, '2ep' is epochs of `epoch` steps, '10%' is a part of the run's `steps`.
  Raises UserError for any other text; `name` is the setting that it names.
  """
  match = re.fullmatch(r'(\d+(?:\.\d+)?)(ep|%|)', str(text).strip())
  if not match or (not match[2] and '.' in match[1]):
    raise UserError(
      f"config.{name}={text!r}: expected a duration such as '500' (steps), '2ep' (epochs) or "
      "'10%' (of the run)"
    )
  count = float(match[1]) * {'': 1, 'ep': epoch, '%': steps / 100}[match[2]]
  return max(1, round(count)) if count else 0


def due(step: int, every: int, last: int) -> bool:
  """Return True after each `every` steps and after the last. `every=0` means only the last."""
  return step == last or (every > 0 and step % every == 0)


def labelled_batch_size(data: DataConfig) -> int:
  """Return the number of labelled images in a batch. One epoch is one pass over these images."""
  return data.batch // (1 + data.unlabelled_ratio) if data.unlabelled else data.batch


def total_steps(config: Config, examples: int) -> int:
  """Return the steps of the run over `examples` labelled examples.

  Raises UserError if a batch has more images than that, or if warm-up and cool-down leave no steps.
  """
  labelled = labelled_batch_size(config.data)
  if labelled > examples:
    part = f', with {labelled} labelled,' if config.data.unlabelled else ''
    raise UserError(
      f'config.data.batch={config.data.batch}{part} is more than the {examples} training examples '
      f'of {config.data.train}'
    )
  epoch = examples / labelled
  steps = config.steps or max(1, round(config.epochs * epoch))
  warmup, cooldown = (
    parse_duration(getattr(config.optim, name), name=f'optim.{name}', steps=steps, epoch=epoch)
    for name in ('warmup', 'cooldown')
  )
  if warmup + cooldown >= steps:
    lengths = {'warmup': warmup, 'cooldown': cooldown}
    flags = ' '.join(f'--config.optim.{name}=0' for name, length in lengths.items() if length)
    raise UserError(
      f'warmup ({warmup}) and cooldown ({cooldown}) leave nothing of {steps} steps: add {flags}, '
      'or train for more steps. A percentage of the run is at least one step'
    )
  return steps
