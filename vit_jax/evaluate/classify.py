"""Classification: exact accuracy and loss over a whole split, every example once, on any number of devices."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.optim.losses import multi_hot
from vit_jax.sharding.mesh import batch_sharding, make_mesh, replicated, to_global

AHEAD = 2  # Batches on their way through the devices at a time.


def count(
  params: dict,
  batch: dict[str, jax.Array],
  *,
  predict: Callable[[dict, jax.Array], jax.Array],
  loss: Callable[[jax.Array, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
  """Sums over the examples of a batch that its mask keeps; a prediction is right that is among the labels [b, m]."""
  return counts(predict(params, batch['image']), batch, loss=loss)


def counts(
  logits: jax.Array, batch: dict[str, jax.Array], *, loss: Callable
) -> dict[str, jax.Array]:
  """`count`, of logits [b, k]."""
  mask = batch['mask']
  _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))  # [b, 5]
  hits = (top[:, :, None] == batch['label'][:, None, :]).any(axis=-1) & mask[:, None]
  losses = loss(logits, multi_hot(batch['label'], logits.shape[-1]))
  return {
    'correct': hits[:, 0].sum(dtype=jnp.int32),
    'correct_top5': hits.any(axis=-1).sum(dtype=jnp.int32),
    'loss': jnp.where(mask, losses, 0).sum(),
    'examples': mask.sum(dtype=jnp.int32),
  }


def classify(counted: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
  """What `count` gave for every batch -> accuracy, accuracy_top5, loss and the number of examples they are means over."""
  batches = jax.device_get(list(counted))
  total = {name: sum(batch[name].item() for batch in batches) for name in batches[0]}
  examples = total['examples']
  means = {
    'accuracy': total['correct'],
    'accuracy_top5': total['correct_top5'],
    'loss': total['loss'],
  }
  return {name: value / max(1, examples) for name, value in means.items()} | {'examples': examples}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationResult:
  """Of a whole split: means over its examples, and what was said of each of them."""

  accuracy: float
  accuracy_top5: float
  loss: float
  examples: int
  skipped: int  # Examples that could not be read.
  images_per_second: float  # Without compilation.
  labels: np.ndarray  # int32 [examples, m], the data set's classes; -1 pads.
  predicted: np.ndarray  # int32 [examples], the data set's classes; -1 is one that it has not.


def evaluate_split(
  params: dict,
  source,
  data: DataConfig,
  *,
  predict: Callable[[dict, jax.Array], jax.Array],
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  columns: np.ndarray,
  progress: Callable[[int], None],
) -> ClassificationResult:
  """Of every example of `source` once, over all devices; images unrounded, as published numbers were made.

  `columns` [the data set's classes]: the number of each one's logit. `data.eval_batch` is filled up to what divides over the
  devices; `progress` is told of each batch that is done.
  """
  mesh = make_mesh(1, batches={})
  data = dataclasses.replace(data, eval_batch=-(-data.eval_batch // mesh.size) * mesh.size)
  params = jax.device_put(params, replicated(mesh))
  step = compiled(params, data, max_labels=source.max_labels, mesh=mesh, predict=predict, loss=loss)
  began, running, done = time.monotonic(), collections.deque(), []

  def finish():
    done.append(jax.device_get(running.popleft()))
    progress(data.eval_batch)

  for batch in eval_batches(
    source, data, host=jax.process_index(), hosts=jax.process_count(), exact=True
  ):
    label = np.where(batch['label'] < 0, -1, columns[batch['label']])
    fed = {'image': batch['image'], 'label': label.astype(np.int32), 'mask': batch['mask']}
    running.append(step(params, to_global(fed, mesh)))
    if len(running) > AHEAD:
      finish()
  while running:
    finish()
  return evaluation(done, columns, examples=len(source), seconds=time.monotonic() - began)


def compiled(
  params: dict, data: DataConfig, *, max_labels: int, mesh, predict: Callable, loss: Callable
) -> Callable:
  """(parameters, a batch) -> its counts, and the class said of each example: a program for batches of this one shape."""

  def step(params, batch):
    logits = predict(params, batch['image'])
    return (
      counts(logits, batch, loss=loss),
      {name: batch[name] for name in ('label', 'mask')},
      logits.argmax(axis=-1),
    )

  b = data.eval_batch
  shapes = {
    'image': ((b, *data.size, 3), np.float32),
    'label': ((b, max_labels), np.int32),
    'mask': ((b,), np.bool_),
  }
  batch = {
    name: jax.ShapeDtypeStruct(*shape, sharding=batch_sharding(mesh))
    for name, shape in shapes.items()
  }
  with jax.set_mesh(mesh):  # Kernels ask it how a batch is split.
    return jax.jit(step, out_shardings=replicated(mesh)).lower(params, batch).compile()


def evaluation(
  done: list, columns: np.ndarray, *, examples: int, seconds: float
) -> ClassificationResult:
  """The batches put together."""
  counted, batches, best = zip(*done, strict=True)
  mask = np.concatenate([batch['mask'] for batch in batches])
  back = functools.partial(numbers_in, columns)
  result = classify(counted)
  return ClassificationResult(
    **result,
    skipped=examples - result['examples'],
    images_per_second=result['examples'] / seconds,
    labels=back(np.concatenate([batch['label'] for batch in batches])[mask]),
    predicted=back(np.concatenate(best)[mask]),
  )


def numbers_in(columns: np.ndarray, logits: np.ndarray) -> np.ndarray:
  """Numbers of logits -> of the data set's classes; -1 where it has not that class."""
  places = np.full(
    max(columns.max(), logits.max(initial=0)) + 2, -1, np.int32
  )  # The last is what -1 means.
  places[columns] = np.arange(len(columns))
  return places[logits]
