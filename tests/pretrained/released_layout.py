"""Files in the released layouts with random parameters of any of our models, none of them zero."""

import flax.traverse_util
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.models.families import build_model
from vit_jax.pretrained.npz import to_google
from vit_jax.step import abstract_params


def draw(
  config: ModelConfig, classes: int, size: tuple[int, int], seed: int = 0
) -> dict[str, np.ndarray]:
  """Return a random flat tree at the scale of trained models.

  Norm scales are around 1, and kernels are scaled by their fan-in.
  """
  rng = np.random.default_rng(seed)
  flat = flax.traverse_util.flatten_dict(
    abstract_params(build_model(config, classes), size), sep='/'
  )
  return {name: value(rng, name, leaf.shape) for name, leaf in sorted(flat.items())}


def value(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Return a random array for the parameter with this name."""
  noise = rng.standard_normal(shape, np.float32)
  # The last norm of a residual branch starts at zero. At one, a deep stem only amplifies rounding.
  if name.endswith('gn3/scale'):
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
  """Write an .npz file in the layout of the released ones, and return its flat tree."""
  flat = draw(config, classes, size, seed)
  save(path, **to_google(flat))
  return flat
