"""The outputs that an evaluator computes for each example, and the means that follow from them.

Shapes: b batch, n examples, m labels of an example (padded with -1), k classes, d width, t colours.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluate.evaluator import Output, Rows
from vit_jax.optim.losses import LOSSES, multi_hot

TOP_K = 5
LOGITS_TO_PROBABILITIES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


def apply_model(model: nn.Module, params: dict, batch: dict[str, jax.Array]):
  """Return what the model computes from the images: logits [b, k] if it has a head."""
  return model.apply({'params': params}, batch['image'])


@functools.cache
def classification(loss: str, logit_indices: tuple[int, ...] = ()) -> Output:
  """Return the output {'loss': [b], 'top5': int32 [b, 5], 'top5_probabilities': [b, 5]}.

  'top5' has the best class first. With `logit_indices`, the output also has 'probabilities'
  [b, len(logit_indices)].

  Args:
    loss: 'softmax' or 'sigmoid', a key of `LOSSES`.
    logit_indices: The classes whose probabilities are returned.
  """

  def apply(model, params, batch):
    logits = apply_model(model, params, batch)
    targets = multi_hot(batch['label'], logits.shape[-1])
    probabilities = LOGITS_TO_PROBABILITIES[loss](logits)
    best = top_k(logits)
    rows = {
      'loss': LOSSES[loss](logits, targets),
      'top5': best,
      'top5_probabilities': jnp.take_along_axis(probabilities, best, axis=-1),
    }
    if logit_indices:
      rows['probabilities'] = probabilities[:, np.array(logit_indices)]
    return rows

  return Output(apply)


@functools.cache
def masked_patches(loss: Callable) -> Output:
  """Return the output {'loss': [b]} of masked patch prediction.

  If colours are predicted, it also has 'correct' and 'colors', int32 [b], the numbers of correct
  colours and of all colours. Images are uint8: the patches that are masked follow from
  the sum of an image's pixels, and the colours from their bits.
  """

  def apply(model, params, batch):
    logits, actual = outputs = apply_model(model, params, batch)
    rows = {'loss': loss(outputs, batch['label'])}
    if not jnp.issubdtype(actual.dtype, jnp.integer):
      return rows
    correct = logits.argmax(axis=-1) == actual  # [b, masked patches, t]
    count = functools.partial(jnp.sum, axis=(1, 2), dtype=jnp.int32)
    return rows | {'correct': count(correct), 'colors': count(jnp.ones_like(correct))}

  return Output(apply, exact_images=False)


def _features(model, params, batch):
  _, sown = model.apply({'params': params}, batch['image'], mutable=['features'])
  return {'features': sown['features']['features'][0].astype(jnp.float32)}


FEATURES = Output(_features)
"""The output {'features': float32 [b, d]}, the input of the head."""


def _attention(model, params, batch):
  _, sown = model.apply({'params': params}, batch['image'], mutable=['attention'])
  (weights,) = jax.tree.leaves(sown['attention']['Transformer']['encoderblock'])
  pixels = jnp.clip(jnp.round(batch['image']), 0, 255).astype(jnp.uint8)
  return {'attention': jnp.moveaxis(weights, 0, 1), 'image': pixels}


ATTENTION = Output(_attention)
"""The output {'attention': [b, depth, heads, tokens, tokens], 'image': uint8 [b, h, w, 3]}.

The last axis of 'attention' is how much of each token a token takes. 'image' is what the model saw,
rounded, to be drawn.
"""


@functools.cache
def top_k_among(logit_indices: tuple[int, ...]) -> Output:
  """Return the output {'top5': int32 [b, 5]}, as places in `logit_indices`, the best first."""

  def apply(model, params, batch):
    logits = apply_model(model, params, batch)
    return {'top5': top_k(logits[:, np.array(logit_indices)])}

  return Output(apply)


@functools.cache
def probabilities_of(loss: str, logit_indices: tuple[int, ...]) -> Output:
  """Return the output {'probabilities': float32 [b, k]} of the classes with these logits.

  A softmax is over these classes alone.
  """

  def apply(model, params, batch):
    logits = apply_model(model, params, batch)[:, np.array(logit_indices)]
    return {'probabilities': LOGITS_TO_PROBABILITIES[loss](logits)}

  return Output(apply)


@functools.cache
def top_probabilities(loss: str, k: int) -> Output:
  """Return the output {'probabilities': [b, k], 'classes': int32 [b, k]}, the best first."""

  def apply(model, params, batch):
    probabilities = LOGITS_TO_PROBABILITIES[loss](apply_model(model, params, batch))
    best, classes = jax.lax.top_k(probabilities, min(k, probabilities.shape[-1]))
    return {'probabilities': best, 'classes': classes}

  return Output(apply)


def top_k(logits: jax.Array) -> jax.Array:
  """Return the classes of the five largest logits [b, 5], the largest first. Ties: lowest first."""
  return jax.lax.top_k(logits, min(TOP_K, logits.shape[-1]))[1]


def is_hit(top: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Return bool [n, 5]: which of the classes `top` [n, 5] are among the labels [n, m]."""
  return (top[:, :, None] == labels[:, None, :]).any(axis=-1)


def mean_classification_metrics(rows: Rows) -> dict[str, float]:
  """Return accuracy, accuracy_top5, loss and examples from rows of `classification`.

  The means are over the readable examples. A prediction is correct if it is among the labels.
  """
  mask = rows['mask']
  hits = is_hit(rows['top5'][mask], rows['label'][mask])
  examples = len(hits)
  totals = {
    'accuracy': hits[:, 0].sum(),
    'accuracy_top5': hits.any(axis=1).sum(),
    'loss': rows['loss'][mask].sum(dtype=np.float64),
  }
  means = {name: float(total) / max(1, examples) for name, total in totals.items()}
  return means | {'examples': examples}


def mean_masked_patch_metrics(rows: Rows) -> dict[str, float]:
  """Return masked_accuracy over all colours, loss and examples from rows of `masked_patches`."""
  mask = rows['mask']
  examples = int(mask.sum())
  metrics = {
    'loss': float(rows['loss'][mask].sum(dtype=np.float64)) / max(1, examples),
    'examples': examples,
  }
  if 'colors' not in rows:
    return metrics
  correct, colors = (rows[name][mask].sum(dtype=np.int64) for name in ('correct', 'colors'))
  return {'masked_accuracy': float(correct) / max(1, int(colors))} | metrics
