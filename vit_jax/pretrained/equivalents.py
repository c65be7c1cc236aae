"""Rewrite parameters for a model with fewer or more layers that computes the same function.

LayerScale can be folded into the layer whose outputs it scales, and a layer without a bias equals
one with a bias of zeros.
"""

from collections.abc import Collection

import numpy as np

from vit_jax.pretrained.arrays import ATTENTION_MODULE, BLOCK_PREFIX

# Names of LayerScale's vectors in a block -> the layer whose outputs they scale.
SCALED_LAYERS = {'attention_scale': f'{ATTENTION_MODULE}/out', 'mlp_scale': 'MlpBlock_3/Dense_1'}
# Layers that may lack a bias.
ATTENTION_BIASES = tuple(
  f'{BLOCK_PREFIX}{ATTENTION_MODULE}/{name}/bias' for name in ('query', 'key', 'value')
)
OPTIONAL_BIASES = (*ATTENTION_BIASES, 'embedding/bias')


def fold_layer_scale(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Multiply LayerScale's vectors [depth, d] into the layers whose outputs they scale."""
  flat = dict(flat)
  for scale, layer in SCALED_LAYERS.items():
    if BLOCK_PREFIX + scale not in flat:
      continue
    gamma = flat.pop(BLOCK_PREFIX + scale)  # Its layer has both arrays, since the tree is complete.
    for leaf in ('kernel', 'bias'):
      name = f'{BLOCK_PREFIX}{layer}/{leaf}'
      factor = gamma.reshape(gamma.shape[0], *[1] * (flat[name].ndim - 2), -1)
      flat[name] = flat[name] * factor
  return flat


def add_zero_biases(flat: dict[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
  """Return the flat tree with a bias of zeros for each of the `names` that it lacks."""
  added = {}
  for name in names:
    kernel = flat.get(name.removesuffix('bias') + 'kernel')
    if name in flat or kernel is None:
      continue
    outputs = kernel.shape[-1:] if name == 'embedding/bias' else kernel.shape[2:]
    depth = kernel.shape[:1] if name.startswith(BLOCK_PREFIX) else ()
    added[name] = np.zeros((*depth, *outputs), np.float32)
  return flat | added


def match_optional_arrays(
  flat: dict[str, np.ndarray], names: Collection[str]
) -> dict[str, np.ndarray]:
  """Return an equivalent flat tree for a model whose parameters are `names`.

  A model without LayerScale gets it folded in, and a model with it gets ones. Biases that only the
  model has are zeros.
  """
  scales = [BLOCK_PREFIX + scale for scale in SCALED_LAYERS]
  if not any(scale in names for scale in scales):
    flat = fold_layer_scale(flat)
  flat = add_zero_biases(flat, [name for name in OPTIONAL_BIASES if name in names])
  for scale in scales:
    kernel = flat.get(f'{BLOCK_PREFIX}{ATTENTION_MODULE}/out/kernel')
    if scale in names and scale not in flat and kernel is not None:
      flat = flat | {scale: np.ones((kernel.shape[0], kernel.shape[-1]), np.float32)}
  return flat


def to_plain(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return an equivalent flat tree without LayerScale and with all biases."""
  return add_zero_biases(fold_layer_scale(flat), OPTIONAL_BIASES)
