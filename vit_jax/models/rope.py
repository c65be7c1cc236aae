"""Rotary positions of two axes, as in DINOv3 (arXiv 2508.10104; RoPE is arXiv 2104.09864).

The channels of a head are pairs. In queries and keys, each pair is rotated by an angle that is
proportional to the row or the column of the patch. Scores then depend on offsets.
Coordinates run from -1 to 1 over an image of any size, so another size or aspect ratio needs no
resampling.

Shapes: b batch, h w patch grid, n tokens, c channels of a head, d width.
`qkv` is [b, n, 3·d], as in attention.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class RotaryPositions:
  """Rotation of queries or keys by the positions of their patches.

  Attributes:
    grid: Patches (height, width) of the image.
    first: Index of the first patch. Tokens before it and after the last patch are not rotated.
    theta: Base of the periods.
  """

  grid: tuple[int, int]
  first: int
  theta: float

  def __call__(self, qkv: jax.Array, heads: int) -> jax.Array:
    """Rotate the queries and keys of the fused projection [b, n, 3·d]."""
    n, d = qkv.shape[1], qkv.shape[2] // 3
    c = d // heads
    # The factors of the values are 1, 0 and 0: they stay.
    cos, from_right, from_left = (
      jnp.asarray(np.pad(np.tile(x, 2 * heads), ((0, 0), (0, d)), constant_values=stay), qkv.dtype)
      for x, stay in zip(rotation_factors(self, n, c), (1, 0, 0), strict=True)
    )
    # Moving whole rows costs a TPU less than splitting the heads into halves.
    right, left = jnp.roll(qkv, -(c // 2), axis=-1), jnp.roll(qkv, c // 2, axis=-1)
    return qkv * cos + right * from_right + left * from_left


def rotation_factors(rope: RotaryPositions, n: int, channels: int) -> np.ndarray:
  """Return the factors [3, n, c] of x_i, x_(i + c/2) and x_(i - c/2) in a rotated head.

  Channel i of the first half becomes cos x_i - sin x_(i + c/2), and channel i + c/2 becomes its
  cosine part plus sin x_i.
  """
  cos, sin = (table[:, 0] for table in rotation_tables(rope, n, channels))
  is_first = np.arange(channels) < channels // 2
  return np.stack([cos, np.where(is_first, -sin, 0), np.where(is_first, 0, sin)])


def rotation_tables(rope: RotaryPositions, n: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the cosines and sines [n, 1, c] of the rotation of each of n tokens.

  Channel i and channel i + c/2 are a pair. Tokens that are not patches have an angle of 0.
  """
  angles = np.tile(rotation_angles(rope.grid, channels, rope.theta), 2)  # [h·w, c]
  after = n - rope.first - len(angles)
  angles = np.pad(angles, ((rope.first, after), (0, 0)))[:, None]
  return np.cos(angles), np.sin(angles)


def rotation_angles(grid: tuple[int, int], channels: int, theta: float) -> np.ndarray:
  """Return the angle of each pair of channels at each patch, float64 [h·w, c/2].

  The first half of the pairs has the angles of the row, the second half those of the column. With
  y the center of the row between -1 and 1, the angles are 2π y / theta^(4 i / c) for i < c/4.
  """
  periods = theta ** (4 * np.arange(channels // 4) / channels)
  centers = [2 * (np.arange(side) + 0.5) / side - 1 for side in grid]
  y, x = np.meshgrid(*centers, indexing='ij')
  coordinates = np.stack([y.ravel(), x.ravel()], axis=1)  # [h·w, 2]
  return (2 * math.pi * coordinates[:, :, None] / periods).reshape(len(coordinates), -1)
