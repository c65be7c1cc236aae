"""The result of `load`: parameters, known facts, and functions of images."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import Prediction, predict_files
from vit_jax.models.families import build_model, family_name, with_article
from vit_jax.sharding.mesh import batch_sharding, make_mesh, replicated, to_global


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedModel:
  """The result of `vit_jax.load`.

  Methods take images as uint8 [b, h, w, c] of `size`, or as float32 in the same range [0, 255]. A
  batch is split over all devices. It is padded to a multiple of their number, and the result is cut
  to b rows.

  Attributes:
    source: name, path or URL of the model.
    params: nested float32 NumPy arrays, in the parameter tree of `model`.
    config: config of the model.
    classes: number of classes, or 0 without a head.
    preprocessing: the steps from a decoded image to the input of the model.
    labels: names of the classes in the order of the logits, or () if unknown.
    loss: loss that the logits were trained with, 'softmax' or 'sigmoid'.
    notes: assumptions, and arrays that were ignored or changed while loading.
    assumed: config fields that the source does not state. They have the format's usual values.
    positions: how its position embeddings are resampled, a key of RESAMPLE_METHODS in resample.py.
    accuracy: published top-1 accuracy on ImageNet's validation split, in percent.
    accuracy_from: source of the accuracy.
  """

  source: str
  params: dict
  config: ModelConfig
  classes: int
  preprocessing: Preprocessing
  labels: tuple[str, ...] = ()
  loss: str = 'softmax'
  notes: tuple[str, ...] = ()
  assumed: tuple[str, ...] = ()
  positions: str = 'corner'
  accuracy: float | None = None
  accuracy_from: str = ''

  @property
  def size(self) -> tuple[int, int]:
    """Image size (height, width) in pixels."""
    return self.preprocessing.size

  @property
  def grid(self) -> tuple[int, int]:
    """Grid (height, width) in patches of an image of `size`."""
    return self.model.shape.grid(self.size)

  @functools.cached_property
  def model(self) -> nn.Module:
    """The Linen module that `params` belong to."""
    return build_model(self.config, self.classes)

  def logits(self, images: np.ndarray) -> jax.Array:
    """Return logits [b, classes] of images [b, h, w, c].

    Raises UserError if the model has no head.
    """
    self.check_has_head()
    return self._apply_on_all_devices(self._logits, images)

  def check_has_head(self):
    """Raise UserError if the model has no head."""
    if not self.classes:
      raise UserError(
        f'{self.source} has no head, and therefore no logits: fine-tune it, or use its features'
      )

  def features(self, images: np.ndarray) -> jax.Array:
    """Return features [b, d] of images [b, h, w, c]: the input of the head."""
    return self._apply_on_all_devices(self._features, images)

  def tokens(self, images: np.ndarray) -> jax.Array:
    """Return tokens [b, n, d] of images [b, h, w, c], after the last norm.

    The class token, if there is one, is first.
    """
    return self._apply_on_all_devices(self._tokens, images)

  def attention(self, images: np.ndarray) -> jax.Array:
    """Return attention weights [b, depth, heads, n, n] of images [b, h, w, c].

    Each token (second to last axis) attends to each token (last axis). The class token, if there is
    one, is first, and registers are last.
    """
    return self._apply_on_all_devices(self._attention, images)

  def predict(self, paths: Iterable[str], *, top: int = 5, batch: int = 32) -> list[Prediction]:
    """Return the `top` most probable classes of each image file, in the order of `paths`.

    Files may have any image size and format.
    """
    return list(predict_files(self, paths, top=top, batch=batch))

  def _apply_on_all_devices(self, function: Callable, images: np.ndarray) -> jax.Array:
    """Apply a jitted function. Raises UserError for images of the wrong shape or dtype."""
    images = np.asarray(images)
    (h, w), c = self.size, self.config.channels
    valid_shape = images.ndim == 4 and images.shape[1:] == (h, w, c)
    if not valid_shape or images.dtype not in (np.uint8, np.float32):
      raise UserError(
        f'images are {images.dtype} {list(images.shape)}: expected uint8 [b, {h}, {w}, {c}]; '
        'load(…, size=…) changes the size'
      )
    b, devices = images.shape[0], self.mesh.size
    padded = np.concatenate([images, np.zeros((-b % devices, *images.shape[1:]), images.dtype)])
    with jax.set_mesh(self.mesh):  # Kernels look up how the batch is split.
      batch = to_global({'image': padded}, self.mesh)
      return function(self.device_params, batch['image'])[:b]

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """The mesh of all devices. Each device has a copy of the parameters."""
    return make_mesh(1, batches={})

  @functools.cached_property
  def device_params(self) -> dict:
    """The parameters as JAX arrays, replicated on every device."""
    return jax.device_put(self.params, replicated(self.mesh))

  @functools.cached_property
  def programs(self) -> dict:
    """The compiled programs of this model's evaluators (see `make_pretrained_evaluator`)."""
    return {}

  @functools.cached_property
  def _logits(self):
    return self._jit(lambda params, images: self.model.apply({'params': params}, images))

  @functools.cached_property
  def _features(self):
    return self._jit(
      lambda params, images: self._sown_values(params, images, 'features')['features'][0]
    )

  @functools.cached_property
  def _tokens(self):
    return self._jit(
      lambda params, images: self._sown_values(params, images, 'tokens')['tokens'][0]
    )

  @functools.cached_property
  def _attention(self):
    def attention(params, images):
      sown = self._sown_values(params, images, 'attention')['Transformer']['encoderblock']
      (weights,) = jax.tree.leaves(sown)  # [depth, b, heads, n, n]
      return jnp.moveaxis(weights, 0, 1)

    return self._jit(attention)

  def _sown_values(self, params: dict, images: jax.Array, collection: str) -> dict:
    """Return the values that the model sows into a Linen collection."""
    variables = self.model.apply({'params': params}, images, mutable=[collection])[1]
    if collection not in variables:
      family = with_article(family_name(self.config.variant))
      raise UserError(f'{self.source} is {family}, which has no {collection}')
    return variables[collection]

  def _jit(self, function: Callable):
    return jax.jit(
      function,
      in_shardings=(replicated(self.mesh), batch_sharding(self.mesh)),
      out_shardings=batch_sharding(self.mesh),
    )
