"""A model under examination: whole splits through it, to features or to its best classes, on any number of devices.

The same in the middle of a run, where devices hold shares of the parameters, as of a model that was loaded. Images come to it
unrounded, as published numbers were made. Every host ends with the rows of all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.sharding.fsdp import shard_map_rows, state_shardings, state_specs
from vit_jax.sharding.mesh import Mesh, batch_sharding, make_mesh, replicated, to_global
from vit_jax.step import compute_features_sharded, predict_logits_sharded

TOP = 5


class StoppedError(Exception):
  """Somebody asked the run to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluator:
  """What every protocol needs of a model, besides the parameters of the moment."""

  model: nn.Module
  shapes: dict  # Of the parameters: how they lie on `mesh` follows from these.
  mesh: Mesh
  data: DataConfig  # What an image goes through; `eval_batch` divides over the devices.
  progress: Callable[[int], None] = lambda images: None  # Told of every batch.
  asked: Callable[[np.ndarray], bool] = lambda values: (
    False
  )  # Given what came of every batch: whether to stop.

  def features(self, params: dict, source) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, d], labels [n, m], -1 pads) of every example that can be read, in the order of `source`."""
    return self._through(self._features, params, source, lambda features: features)

  def best(self, params: dict, source, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the best of the logits `columns`, their places in it [n, 5], the best first; labels [n, m]), likewise."""
    top = lambda logits: np.argsort(-logits[:, columns], axis=1, kind='stable')[:, :TOP]
    return self._through(self._logits, params, source, top)

  def logits(self, params: dict, source, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the logits `columns` [n, k] of every example, in the order of `source`, which of them could be read [n])."""
    said = [
      (values[:, columns], mask) for values, _, mask in self._batches(self._logits, params, source)
    ]
    values, mask = (np.concatenate(each)[: len(source)] for each in zip(*said, strict=True))
    return values, mask

  def _through(
    self, function: Callable, params: dict, source, then: Callable
  ) -> tuple[np.ndarray, np.ndarray]:
    """What `then` makes of what `function` says of the examples, and their labels, without what cannot be read."""
    said = (
      (then(values[mask]), label[mask])
      for values, label, mask in self._batches(function, params, source)
    )
    out, labels = zip(*said, strict=True)
    return np.concatenate(out), np.concatenate(labels)

  def _batches(
    self, function: Callable, params: dict, source
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(what `function` says, labels, mask) of one batch after another; every host has the rows of all."""
    hosts = {'host': jax.process_index(), 'hosts': jax.process_count()}
    for made in eval_batches(source, self.data, **hosts, exact=True):
      batch = {name: made[name] for name in ('image', 'label', 'mask')}
      with jax.set_mesh(self.mesh):  # Kernels ask it how a batch is split.
        values, label, mask = jax.device_get(function(params, to_global(batch, self.mesh)))
      yield values, label, mask
      if self.asked(values):
        raise StoppedError
      self.progress(len(mask))

  @functools.cached_property
  def _features(self) -> Callable:
    return self._compiled(compute_features_sharded)

  @functools.cached_property
  def _logits(self) -> Callable:
    return self._compiled(predict_logits_sharded)

  def _compiled(self, apply: Callable) -> Callable:
    """(parameters, a global batch) -> what `apply` makes of the images, the labels and the mask, on every host."""
    specs = state_specs(self.shapes, self.mesh)

    def local(params, batch):
      return (
        apply(params, batch['image'], model=self.model, specs=specs),
        batch['label'],
        batch['mask'],
      )

    shardings = (state_shardings(self.shapes, self.mesh), batch_sharding(self.mesh))
    spread = shard_map_rows(local, self.mesh, specs)
    return jax.jit(spread, in_shardings=shardings, out_shardings=replicated(self.mesh))


def make_pretrained_evaluator(
  model, data: DataConfig, *, progress: Callable[[int], None] = lambda images: None
) -> tuple[Evaluator, dict]:
  """(the Subject that a Pretrained is, its parameters on all devices). `data.eval_batch` is filled up to divide over them."""
  mesh = make_mesh(1, batches={})
  data = dataclasses.replace(data, eval_batch=-(-data.eval_batch // mesh.size) * mesh.size)
  subject = Evaluator(
    model=model.model, shapes=model.params, mesh=mesh, data=data, progress=progress
  )
  return subject, jax.device_put(model.params, replicated(mesh))
