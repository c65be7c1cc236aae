"""Images of examples, as the model sees them, inside the page."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.preprocessing import Preprocessing

PIXELATED_SIDE = 64  # Smaller images are stored exactly, and the browser enlarges their pixels.
_BATCH = 32


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenExamples:
  """Some examples of a source, as a source."""

  source: object
  places: tuple[int, ...]  # Their indices in the source.

  @property
  def max_labels(self) -> int:
    """The largest number of labels of an example."""
    return self.source.max_labels

  def is_user_file(self, i: int) -> bool:
    """Return whether example `i` is a file of the user."""
    return self.source.is_user_file(self.places[i])

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, i: int):
    return self.source[self.places[i]]


def read_images(source, data: DataConfig, steps: Preprocessing) -> np.ndarray:
  """Return uint8 [n, h, w, c] of all examples, preprocessed as for an evaluation."""
  data = dataclasses.replace(data, eval_batch=min(_BATCH, len(source)), bad_images='skip')
  batches = eval_batches(source, data, host=0, hosts=1, steps=steps)
  return np.concatenate([batch['image'] for batch in batches])[: len(source)]


def encode_image(image: np.ndarray, side: int) -> str:
  """Return a data URI of an image, uint8 [h, w, c], whose longer side is at most `side` pixels."""
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  if max(picture.size) <= PIXELATED_SIDE:
    return encode_file(picture, 'png')
  picture.thumbnail((side, side), Image.Resampling.LANCZOS)
  return encode_file(picture, 'jpeg', quality=82)


def encode_file(picture: Image.Image, format: str, **options) -> str:
  """Return a data URI of a picture in the format 'png' or 'jpeg'."""
  file = io.BytesIO()
  picture.save(file, format, optimize=True, **options)
  return f'data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}'
