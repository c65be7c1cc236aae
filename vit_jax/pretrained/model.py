"""A pre-trained model in the hand: its parameters, what is known of it, and what it says of images."""

import dataclasses
import functools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import Prediction, predict_files
from vit_jax.models.families import build_model, family_name, with_article
from vit_jax.sharding.mesh import batch_sharding, make_mesh, replicated, to_global


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedModel:
  """What `vit_jax.load` returns. Images are uint8 [b, h, w, 3] of `size` (or float32 with the same range).

  They go to all devices together: a batch is filled up to a multiple of their number, and the result cut back.
  """

  source: str
  params: dict  # NumPy arrays, float32, in the tree of the model.
  config: ModelConfig
  classes: int  # 0 where there is no head.
  preprocessing: dict  # size (height, width), crop, short_side, mean and scale: what an image went through in training.
  labels: tuple[str, ...] = ()  # In the order of the logits; () where nobody says.
  loss: str = 'softmax'  # What the logits were trained with: softmax, or sigmoid.
  notes: tuple[str, ...] = ()  # What was assumed, left out or changed on the way in.
  assumed: tuple[
    str, ...
  ] = ()  # Fields that nobody said: they are what files of this format usually have.
  accuracy: float | None = (
    None  # Expected top-1 on ImageNet's validation split in percent, where one is published …
  )
  accuracy_from: str = ''  # … and by whom.

  @property
  def size(self) -> tuple[int, int]:
    """Height and width in pixels of the images it takes."""
    return tuple(self.preprocessing['size'])

  @property
  def grid(self) -> tuple[int, int]:
    """Patches (height, width) of such an image."""
    return self.model.shape.grid(self.size)

  @functools.cached_property
  def model(self) -> nn.Module:
    """The linen module that `params` are of."""
    return build_model(self.config, self.classes)

  def logits(self, images: np.ndarray) -> jax.Array:
    """[b, h, w, 3] -> [b, classes]. UserError where the model has no head."""
    self.refuse_no_head()
    return self._run(self._logits, images)

  def refuse_no_head(self):
    """UserError where there is nothing to classify with."""
    if not self.classes:
      raise UserError(
        f'{self.source} has no head, hence no logits: fine-tune it, or use its features'
      )

  def features(self, images: np.ndarray) -> jax.Array:
    """[b, h, w, 3] -> [b, d]: what the head reads."""
    return self._run(self._features, images)

  def tokens(self, images: np.ndarray) -> jax.Array:
    """[b, h, w, 3] -> [b, n, d]: every token after the last norm; the class token, where there is one, is the first."""
    return self._run(self._tokens, images)

  def attention(self, images: np.ndarray) -> jax.Array:
    """[b, h, w, 3] -> [b, depth, heads, n, n]: how much of each token (last axis) each token takes.

    The class token, where there is one, is the first, and registers are the last.
    """
    return self._run(self._attention, images)

  def predict(self, paths: Iterable[str], *, top: int = 5, batch: int = 32) -> list[Prediction]:
    """The `top` most probable classes of each image file, of any size and kind, in the order of `paths`."""
    return list(predict_files(self, paths, top=top, batch=batch))

  def _run(self, function, images: np.ndarray) -> jax.Array:
    """Over all devices. UserError for images of another size or kind."""
    images = np.asarray(images)
    if (
      images.ndim != 4
      or images.shape[1:] != (*self.size, 3)
      or images.dtype not in (np.uint8, np.float32)
    ):
      expected = f'uint8 [b, {self.size[0]}, {self.size[1]}, 3]'
      raise UserError(
        f'images are {images.dtype} {list(images.shape)}: expected {expected}; load(…, size=…) changes the size'
      )
    b, devices = images.shape[0], self._mesh.size
    full = np.concatenate([images, np.zeros((-b % devices, *images.shape[1:]), images.dtype)])
    with jax.set_mesh(self._mesh):  # Kernels ask it how a batch is split.
      return function(self._placed, to_global({'image': full}, self._mesh)['image'])[:b]

  @functools.cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return make_mesh(1, batches={})

  @functools.cached_property
  def _placed(self) -> dict:
    """The parameters on every device."""
    return jax.device_put(self.params, replicated(self._mesh))

  @functools.cached_property
  def _logits(self):
    return self._compiled(lambda params, images: self.model.apply({'params': params}, images))

  @functools.cached_property
  def _features(self):
    return self._compiled(
      lambda params, images: self._sown(params, images, 'features')['features'][0]
    )

  @functools.cached_property
  def _tokens(self):
    return self._compiled(lambda params, images: self._sown(params, images, 'tokens')['tokens'][0])

  @functools.cached_property
  def _attention(self):
    def attention(params, images):
      blocks = self._sown(params, images, 'attention')['Transformer']['encoderblock']
      (weights,) = jax.tree.leaves(blocks)
      return jnp.moveaxis(weights, 0, 1)  # [b, depth, heads, n, n]

    return self._compiled(attention)

  def _sown(self, params: dict, images: jax.Array, collection: str) -> dict:
    found = self.model.apply({'params': params}, images, mutable=[collection])[1]
    if collection not in found:
      raise UserError(
        f'{self.source} is {with_article(family_name(self.config.variant))}, which has no {collection}'
      )
    return found[collection]

  def _compiled(self, function):
    return jax.jit(
      function,
      in_shardings=(replicated(self._mesh), batch_sharding(self._mesh)),
      out_shardings=batch_sharding(self._mesh),
    )
