"""Checksums of arrays that do not depend on their layout over devices, hosts and processes.

The bits of each element are mixed with its index, and the results are added up. Every device adds
up its own elements and nothing is gathered. The mixing is a bijection of 32 bits, so any change of
a single element is detected. Other accidental changes are missed with probability 2^-64. The
checksum is no protection against deliberate changes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vit_jax.sharding.mesh import replicated
from vit_jax.sharding.prng import murmur3_finalize


def leaves_by_path(tree) -> dict[str, jax.Array]:
  """Return the leaves of a tree of arrays, shapes or metadata as {'params/head/kernel': leaf}.

  Checkpoints hold these paths.
  """
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def compute_checksums(tree) -> dict[str, jax.Array]:
  """Return {path of a leaf: uint32 [3]}: two halves of its checksum, and its non-finite count.

  Returns before the devices are done. All hosts that hold a part of an array have to call it; all
  get the result. NumPy arrays are moved to a device one at a time.
  """
  arrays = leaves_by_path(tree)
  if all(isinstance(leaf, np.ndarray) for leaf in arrays.values()):
    # Flat, so that arrays of equal size share one compiled program.
    return {name: _checksum_host_array(x.reshape(-1)) for name, x in arrays.items()}
  shardings = [leaf.sharding for leaf in arrays.values() if isinstance(leaf, jax.Array)]
  meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
  return _compile_checksums(replicated(meshes[0]) if meshes else None)(arrays)


@functools.cache
def _compile_checksums(sharding: NamedSharding | None):
  """Return the compiled function for arrays on one mesh."""

  def checksum_all(arrays):
    return {name: _checksum_array(x) for name, x in arrays.items()}

  return jax.jit(checksum_all, out_shardings=sharding)


def _checksum_array(x: jax.Array) -> jax.Array:
  """Return uint32 [3] for an array of any shape with up to 32 bits per element."""
  index, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  high = murmur3_finalize(_bits_as_uint32(x) ^ murmur3_finalize(index))
  low = (high ^ (high >> 15)) * jnp.uint32(0x2C1B3C6D)
  low ^= low >> 13
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  nonfinite = ~jnp.isfinite(x) if is_float else jnp.zeros(x.shape, bool)
  parts, zeros = (high, low, nonfinite.astype(jnp.uint32)), (jnp.uint32(0),) * 3

  def add(a, b):
    return tuple(map(jnp.add, a, b))

  # A single reduction over all three vectorizes: 9 GiB/s on one core.
  return jnp.stack(jax.lax.reduce(parts, zeros, add, range(x.ndim)))


_checksum_host_array = jax.jit(_checksum_array)


def _bits_as_uint32(x: jax.Array) -> jax.Array:
  """Return the bits of each element as uint32."""
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def format_checksum(value: np.ndarray) -> str:
  """Return a result of `compute_checksums` as 16 hexadecimal digits."""
  return f'{int(value[0]):08x}{int(value[1]):08x}'
