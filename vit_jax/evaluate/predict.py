"""Image files -> the most probable classes of each, in batches."""

import dataclasses
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.folder import IMAGE_EXTENSIONS
from vit_jax.data.images import BadImageError
from vit_jax.data.loader import diagnose_bad_example, eval_batches
from vit_jax.errors import UserError

LOGITS_TO_PROBABILITIES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
  """Of one file: its most probable classes, the first of them first; or why there are none."""

  path: str
  labels: tuple[str, ...] = ()
  probabilities: tuple[float, ...] = ()
  error: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFiles:
  """Image files as a source of examples without labels."""

  paths: tuple[str, ...]
  max_labels: int = 1

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: int) -> tuple[bytes, tuple[int, ...], str]:
    path = self.paths[i]
    try:
      return Path(path).read_bytes(), (), path
    except OSError as error:
      raise BadImageError(path, error.strerror or str(error)) from None


def predict_files(model, paths: Iterable[str], *, top: int, batch: int) -> Iterator[Prediction]:
  """One for each path, in their order. `model`: a Pretrained. A file that is no image gives a prediction with an error.

  UserError where the model cannot classify: it has no head, or one that was never trained.
  """
  check_trained_head(model)
  files = ImageFiles(tuple(map(str, paths)))
  if not files.paths:
    raise UserError('there are no images to predict')
  data = eval_data_config(model, batch=min(batch, len(files)))
  names = model.labels or tuple(f'class {i}' for i in range(model.classes))
  for k, part in enumerate(eval_batches(files, data, host=0, hosts=1, exact=True)):
    probabilities = np.asarray(
      LOGITS_TO_PROBABILITIES[model.loss](model.logits(part['image']))
    )  # [b, k]
    best = np.argsort(-probabilities, axis=-1, kind='stable')[:, :top]
    for row, path in enumerate(files.paths[k * data.eval_batch : (k + 1) * data.eval_batch]):
      if part['mask'][row]:
        yield Prediction(
          path, tuple(names[i] for i in best[row]), tuple(probabilities[row, best[row]].tolist())
        )
      else:
        yield Prediction(
          path, error=diagnose_bad_example(files, k * data.eval_batch + row, data.max_pixels)[1]
        )


def check_trained_head(model):
  """UserError where a Pretrained cannot classify: it has no head, or one that was never trained."""
  model.check_has_head()
  if not model.params['head']['kernel'].any():
    raise UserError(
      f'{model.source} has a head of zeros, which says the same of every image: fine-tune it first'
    )


def eval_data_config(model, *, batch: int, **options) -> DataConfig:
  """What an image goes through on its way to a Pretrained. Images that cannot be read are left out, unless `options` say so."""
  how = model.preprocessing
  preprocessing = {
    'size': model.size,
    'eval_crop': how['crop'],
    'eval_short_side': how['short_side'],
  }
  return DataConfig(eval_batch=batch, **preprocessing, **{'bad_images': 'skip'} | options)


def find_image_files(patterns: Iterable[str]) -> list[str]:
  """Files, folders (every image below them) and glob patterns -> paths, each once, sorted within each of the patterns.

  UserError where one of them has nothing. A file that is named is taken for an image whatever its name.
  """
  paths = []
  for pattern in patterns:
    # Unlike pathlib's, this glob leaves hidden files alone.
    matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    found = [
      path
      for match in matches
      for path in (_list_images_below(Path(match)) if Path(match).is_dir() else [match])
    ]
    if not found:
      raise UserError(
        f'{pattern}: there is no such image, folder of images, or pattern that matches one'
      )
    paths += found
  return list(dict.fromkeys(paths))


def _list_images_below(folder: Path) -> list[str]:
  """The image files anywhere in a folder, sorted. Hidden files and folders are passed over."""
  hidden = lambda path: any(part.startswith('.') for part in path.relative_to(folder).parts)
  found = (
    path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()
  )
  return sorted(str(path) for path in found if not hidden(path))
