"""Predict the most probable classes of image files."""

import dataclasses
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.image_files import list_images, note_passed_over, read_image_file
from vit_jax.data.loader import diagnose_bad_example
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.outputs import top_probabilities
from vit_jax.runtime.files import split_pattern


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
  """The most probable classes of one file, the best first, or the reason why there are none."""

  path: str
  labels: tuple[str, ...] = ()
  probabilities: tuple[float, ...] = ()
  error: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFiles:
  """Image files as a source of examples without labels."""

  paths: tuple[str, ...]
  max_labels: int = 1

  def is_user_file(self, i: int) -> bool:
    """Return True: every example is a file of the user."""
    return i >= 0

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: int) -> tuple[bytes, tuple[int, ...], str]:
    return read_image_file(Path(self.paths[i])), (), self.paths[i]


def predict_files(
  model, paths: Iterable[str], *, top: int, batch: int, threshold: float | None = None
) -> Iterator[Prediction]:
  """Yield a prediction of `model`, a `PretrainedModel`, for each path, in their order.

  It has the `top` most probable classes, without those of a probability below `threshold`.
  The prediction for a file that is not an image has an error. Raises UserError if the model has no
  trained head, or if there are no paths.
  """
  check_trained_head(model)
  files = ImageFiles(tuple(map(str, paths)))
  if not files.paths:
    raise UserError('there are no images to predict')
  data = eval_data_config(model, batch=min(batch, len(files)))
  evaluator, params = make_pretrained_evaluator(model, data)
  names = model.labels or tuple(f'class {i}' for i in range(model.classes))
  start = 0
  for rows in evaluator.batches(params, files, top_probabilities(model.loss, top)):
    for row, readable in enumerate(rows['mask']):
      path = files.paths[start + row]
      if readable:
        probabilities = rows['probabilities'][row].tolist()  # In descending order.
        count = sum(p >= (threshold or 0) for p in probabilities)
        labels = tuple(names[i] for i in rows['classes'][row][:count])
        yield Prediction(path, labels, tuple(probabilities[:count]))
      else:
        _, reason = diagnose_bad_example(files, start + row, data.max_pixels)
        yield Prediction(path, error=reason)
    start += len(rows['mask'])


def check_trained_head(model):
  """Raise UserError if the head of a `PretrainedModel` is missing or all zero."""
  model.check_has_head()
  if not np.any(model.params['head']['kernel']):
    raise UserError(
      f'{model.source} has a head of zeros, which gives every image the same prediction: '
      'fine-tune it first'
    )


def eval_data_config(model, *, batch: int, **options) -> DataConfig:
  """Return the data settings of evaluations of a `PretrainedModel`, with its image size.

  The other steps are in `model.preprocessing`. `options` are further fields of `DataConfig`. By
  default, unreadable images are skipped.
  """
  return DataConfig(eval_batch=batch, size=model.size, **{'bad_images': 'skip'} | options)


def find_image_files(patterns: Iterable[str]) -> list[str]:
  """Return the paths of images given as files, folders or glob patterns, each path once.

  A folder stands for every image below it. A file given by its name may have any extension.
  Paths are sorted within each pattern. Raises UserError if a pattern matches nothing.
  """
  paths = []
  for pattern in patterns:
    try:
      found = [path for match in _expand_pattern(pattern) for path in _list_images(Path(match))]
    except OSError as error:
      raise UserError(f'{error.filename}: {error.strerror}') from None
    if not found:
      raise UserError(
        f'{pattern}: no such image, folder of images, or pattern that matches an image'
      )
    paths += found
  return list(dict.fromkeys(paths))


def _expand_pattern(pattern: str) -> list[str]:
  if Path(pattern).exists():
    return [pattern]
  directory, rest = split_pattern(pattern)
  # Unlike the glob of pathlib, this one skips hidden files.
  matches = glob.glob(rest, root_dir=directory, recursive=True)  # noqa: PTH207
  return sorted(str(directory / match) for match in matches)


def _list_images(path: Path) -> list[str]:
  """Return a file, or the sorted image files anywhere below a folder without the hidden ones."""
  if not path.is_dir():
    return [str(path)]
  images, others = list_images(path)
  note_passed_over(str(path), {'': others})
  return [str(path / image) for image in images]
