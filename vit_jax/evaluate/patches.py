"""How well masked patches are told, over a whole split, every example once."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp


def count_patches(
  params: dict, batch: dict[str, jax.Array], *, predict: Callable, loss: Callable
) -> dict[str, jax.Array]:
  """Sums over the examples of a batch that its mask keeps: of losses, and where colours are told, of those that are right."""
  said = predict(params, batch['image'])
  logits, actual = said
  mask = batch['mask']
  sums = {
    'loss': jnp.where(mask, loss(said, batch['label']), 0).sum(),
    'examples': mask.sum(dtype=jnp.int32),
  }
  if not jnp.issubdtype(actual.dtype, jnp.integer):
    return sums
  right = (logits.argmax(axis=-1) == actual) & mask[:, None, None]
  told = jnp.broadcast_to(mask[:, None, None], right.shape)
  return sums | {'correct': right.sum(dtype=jnp.int32), 'told': told.sum(dtype=jnp.int32)}


def patch_means(counted: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
  """What `count_patches` gave for every batch -> masked_accuracy, of all colours told, where there are any; loss, examples."""
  batches = jax.device_get(list(counted))
  total = {name: sum(batch[name].item() for batch in batches) for name in batches[0]}
  examples = total['examples']
  accuracy = (
    {'masked_accuracy': total['correct'] / max(1, total['told'])} if 'told' in total else {}
  )
  return accuracy | {'loss': total['loss'] / max(1, examples), 'examples': examples}
