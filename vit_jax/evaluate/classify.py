"""Classification: exact accuracy and loss over a whole split, every example once, on any number of devices."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from vit_jax.losses import multi_hot


def count(
  params: dict,
  batch: dict[str, jax.Array],
  *,
  predict: Callable[[dict, jax.Array], jax.Array],
  loss: Callable[[jax.Array, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
  """Sums over the examples of a batch that its mask keeps; a prediction is right that is among the labels [b, m]."""
  logits, mask = predict(params, batch['image']), batch['mask']
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
  means = {'accuracy': total['correct'], 'accuracy_top5': total['correct_top5'], 'loss': total['loss']}
  return {name: value / max(1, examples) for name, value in means.items()} | {'examples': examples}
