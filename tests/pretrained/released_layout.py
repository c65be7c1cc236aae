"""Files in the released layouts, made from random parameters of any of our models: every array drawn, none of them zero."""

import flax.traverse_util
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.models.families import build_model
from vit_jax.pretrained.npz import to_google
from vit_jax.step import abstract_params


def draw(
  config: ModelConfig, classes: int, size: tuple[int, int], seed: int = 0
) -> dict[str, np.ndarray]:
  """The flat tree of a model, at the scale that trained ones have: norms around 1, kernels by their fan-in."""
  rng = np.random.default_rng(seed)
  flat = flax.traverse_util.flatten_dict(
    abstract_params(build_model(config, classes), size), sep='/'
  )
  return {name: value(rng, name, leaf.shape) for name, leaf in sorted(flat.items())}


def value(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """One array."""
  noise = rng.standard_normal(shape, np.float32)
  if name.endswith(
    'gn3/scale'
  ):  # Of a residual branch, which starts at zero: at one, a deep stem only amplifies rounding.
    return 0.2 + 0.02 * noise
  if name.endswith('scale'):
    return 1 + 0.1 * noise
  if name.endswith('kernel'):
    inside = shape[1:] if 'encoderblock/' in name else shape
    outputs = (
      inside[1:] if name.endswith(('query/kernel', 'key/kernel', 'value/kernel')) else inside[-1:]
    )
    return noise * np.sqrt(np.prod(outputs, dtype=np.float32) / np.prod(inside, dtype=np.float32))
  return (0.5 if name == 'probe' else 0.1) * noise


def google_file(
  path, config: ModelConfig, *, classes: int, size: tuple[int, int], seed: int = 0, save=np.savez
):
  """Writes an .npz as the released ones are; the flat tree it holds."""
  flat = draw(config, classes, size, seed)
  save(path, **to_google(flat))
  return flat
