"""Image files -> the most probable classes of each, in batches."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.folder import EXTENSIONS
from vit_jax.data.images import BadImage, decode
from vit_jax.data.loader import eval_batches
from vit_jax.errors import UserError

PROBABILITIES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
  """Of one file: its most probable classes, the first of them first; or why there are none."""

  path: str
  labels: tuple[str, ...] = ()
  probabilities: tuple[float, ...] = ()
  error: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Files:
  """Image files as a source of examples without labels."""

  paths: tuple[str, ...]
  most_labels: int = 1

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: int) -> tuple[bytes, tuple[int, ...], str]:
    path = self.paths[i]
    try:
      return Path(path).read_bytes(), (), path
    except OSError as error:
      raise BadImage(path, error.strerror or str(error)) from None


def predictions(model, paths: Iterable[str], *, top: int, batch: int) -> Iterator[Prediction]:
  """One for each path, in their order. `model`: a Pretrained. A file that is no image gives a prediction with an error.

  UserError where the model cannot classify: it has no head, or one that was never trained.
  """
  files = Files(tuple(map(str, paths)))
  if not files.paths:
    raise UserError('there are no images to predict')
  model.refuse_no_head()
  if not model.params['head']['kernel'].any():
    raise UserError(f'{model.source} has a head of zeros, which says the same of every image: fine-tune it first')
  how = model.preprocessing
  data = DataConfig(
    eval_batch=min(batch, len(files)),
    size=model.size,
    eval_crop=how['crop'],
    eval_short_side=how['short_side'],
    bad_images='skip',
  )
  names = model.labels or tuple(f'class {i}' for i in range(model.classes))
  for k, part in enumerate(eval_batches(files, data, host=0, hosts=1, exact=True)):
    probabilities = np.asarray(PROBABILITIES[model.loss](model.logits(part['image'])))
    best = np.argsort(-probabilities, axis=-1, kind='stable')[:, :top]
    for row, path in enumerate(files.paths[k * data.eval_batch : (k + 1) * data.eval_batch]):
      if part['mask'][row]:
        yield Prediction(path, tuple(names[i] for i in best[row]), tuple(probabilities[row, best[row]].tolist()))
      else:
        yield Prediction(path, error=why(files, k * data.eval_batch + row, data.max_pixels))


def why(files: Files, i: int, max_pixels: int) -> str:
  """What is wrong with a file, found out again: a batch only says that something is."""
  try:
    data, _, name = files[i]
    decode(data, name=name, max_pixels=max_pixels)
  except BadImage as error:
    return error.args[1]
  return 'it could not be read a moment ago'


def find_images(patterns: Iterable[str]) -> list[str]:
  """Files, folders (every image below them) and glob patterns -> paths, sorted within each. UserError where one has nothing."""
  paths = []
  for pattern in patterns:
    path = Path(pattern).expanduser()
    if path.is_dir():
      found = sorted(below for below in path.rglob('*') if below.suffix.lower() in EXTENSIONS and below.is_file())
    else:
      found = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not found:
      raise UserError(f'{pattern}: there is no such image, folder of images, or pattern that matches one')
    paths += map(str, found)
  return paths
