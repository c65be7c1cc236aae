"""Rotary positions of two axes, as in DINOv3 (arXiv 2508.10104; RoPE is arXiv 2104.09864).

EVA-02 (arXiv 2303.11331) and ViT-5 (arXiv 2602.08071) count patches instead.

The channels of a head are pairs. In queries and keys, each pair is rotated by an angle that is
proportional to the row or the column of the patch. Scores then depend on offsets.
Coordinates have the same range over an image of any size, so another size or aspect ratio needs no
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
    counted: Number that is counted along each side. 0 means coordinates from -1 to 1.
    register_theta: Base of the periods of the tokens after the patches, which are a square grid of
      their own. 0 means that they are not rotated.
  """

  grid: tuple[int, int]
  first: int
  theta: float
  counted: int = 0
  register_theta: float = 0.0

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
  angles = rotation_angles(rope.grid, channels, rope.theta, rope.counted)
  after = n - rope.first - len(angles)
  angles = np.pad(angles, ((rope.first, after), (0, 0)))
  if rope.register_theta:
    side = math.isqrt(after)
    angles[n - after :] = rotation_angles((side, side), channels, rope.register_theta, side)
  angles = np.tile(angles, 2)[:, None]  # [n, 1, c]
  return np.cos(angles), np.sin(angles)


def rotation_angles(
  grid: tuple[int, int], channels: int, theta: float, counted: int = 0
) -> np.ndarray:
  """Return the angle of each pair of channels at each patch, float64 [h·w, c/2].

  The first half of the pairs has the angles of the row, the second half those of the column. With
  y the center of the row between -1 and 1, the angles are 2π y / theta^(4 i / c) for i < c/4.
  With `counted`, they are y / theta^(4 i / c), and y is counted · (row / rows).
  """
  periods = theta ** (4 * np.arange(channels // 4) / channels)
  if counted:
    axes = [counted * np.arange(side) / side for side in grid]
  else:
    axes = [2 * math.pi * (2 * (np.arange(side) + 0.5) / side - 1) for side in grid]
  y, x = np.meshgrid(*axes, indexing='ij')
  angles = np.stack([y.ravel(), x.ravel()], axis=1)[:, :, None] / periods  # [h·w, 2, c/4]
  return angles.reshape(len(angles), -1)
