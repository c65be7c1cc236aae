"""Checksums equal a NumPy definition on any layout, and detect flipped bits, holes and swaps."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.checkpoint import checksum
from vit_jax.checkpoint.checksum import compute_checksums, format_checksum
from vit_jax.sharding.mesh import make_mesh

U32 = np.uint32


def numpy_checksum(array: np.ndarray) -> str:
  """Compute the checksum by its definition, element by element."""

  def finalize(x):
    x = (x ^ (x >> U32(16))) * U32(0x85EBCA6B)
    x = (x ^ (x >> U32(13))) * U32(0xC2B2AE35)
    return x ^ (x >> U32(16))

  bits = np.ascontiguousarray(array).reshape(-1).view(f'u{array.dtype.itemsize}').astype(U32)
  high = finalize(bits ^ finalize(np.arange(bits.size, dtype=U32)))
  low = (high ^ (high >> U32(15))) * U32(0x2C1B3C6D)
  low ^= low >> U32(13)
  return f'{high.sum(dtype=U32):08x}{low.sum(dtype=U32):08x}'


def checksum_of(array) -> str:
  return format_checksum(jax.device_get(compute_checksums({'x': array})['x']))


@functools.cache
def sample() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(4, 24, 16)).astype(np.float32)


@pytest.mark.parametrize(
  'dtype', [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.bool_]
)
@pytest.mark.parametrize('shape', [(), (0,), (7,), (3, 5), (2, 3, 4, 5)])
def test_a_checksum_equals_its_numpy_definition(dtype, shape):
  array = np.asarray(np.random.default_rng(1).normal(size=shape) * 50).astype(dtype)
  assert checksum_of(array) == checksum_of(jax.device_put(array)) == numpy_checksum(array)


def test_host_arrays_of_equal_size_share_one_compiled_program():
  before = checksum._checksum_host_array._cache_size()
  arrays = {str(shape): np.zeros(shape, np.float16) for shape in [(3, 70), (70, 3), (210,)]}
  compute_checksums(arrays)
  assert checksum._checksum_host_array._cache_size() == before + 1


@pytest.mark.parametrize(
  'spec',
  [(), ('fsdp',), (None, 'fsdp'), (None, None, 'fsdp'), ('fsdp', 'data'), (('data', 'fsdp'),)],
)
def test_a_checksum_is_the_same_on_every_layout(spec):
  mesh = make_mesh(4, batches={})
  wide = np.tile(sample(), (2, 1, 1))
  array = jax.device_put(wide, NamedSharding(mesh, PartitionSpec(*spec)))
  assert checksum_of(array) == checksum_of(wide) == numpy_checksum(wide)


def test_every_flipped_bit_is_detected():
  """Flip all bits of a small array, with elements of two sizes."""
  for array in (sample()[0, :4], sample()[0, :4].astype(ml_dtypes.bfloat16)):
    expected, seen = checksum_of(array), set()
    for bit in range(8 * array.nbytes):
      raw = bytearray(array.tobytes())
      raw[bit // 8] ^= 1 << bit % 8
      seen.add(checksum_of(np.frombuffer(raw, array.dtype).reshape(array.shape)))
    assert expected not in seen and len(seen) == 8 * array.nbytes


def test_flipped_signs_holes_swaps_and_shifts_are_detected():
  array, rng = sample(), np.random.default_rng(2)
  expected, seen = checksum_of(array), []
  for _ in range(300):
    i, j = rng.integers(0, array.size, 2)
    flat = [array.flatten() for _ in range(4)]
    flat[0][[i, j]] *= -1
    flat[1][i : i + 128] = 0
    flat[2][[i, j]] = flat[2][[j, i]]
    flat[3] = np.roll(flat[3], 1 + i % (array.size - 1))
    seen += [checksum_of(x.reshape(array.shape)) for x in flat if x.tobytes() != array.tobytes()]
  assert len(seen) > 1100 and expected not in seen


def test_a_checksum_depends_on_the_dtype_and_not_on_the_shape():
  """The manifest holds shapes and dtypes."""
  assert checksum_of(sample()) == checksum_of(sample().reshape(-1))
  assert checksum_of(jnp.ones(3, jnp.int32)) != checksum_of(jnp.ones(3, jnp.float32))


def test_non_finite_elements_are_counted():
  array = sample().copy()
  array[0, 0, :3] = np.nan, np.inf, -np.inf
  count = lambda x: int(jax.device_get(compute_checksums({'x': x})['x'])[2])
  assert (
    count(array),
    count(array.astype(ml_dtypes.bfloat16)),
    count(sample()),
    count(np.arange(5)),
  ) == (3, 3, 0, 0)
