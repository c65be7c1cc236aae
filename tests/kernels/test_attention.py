"""Tests of the attention kernel, interpreted on a CPU.

Its error against NumPy in float64 must not exceed the error of XLA in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vit_jax.kernels import attention as kernel
from vit_jax.models.attention import split_qkv
from vit_jax.models.rope import RotaryPositions, rotation_angles, rotation_factors

SOME_LENGTHS = [1, 7, 16, 49, 65, 128, 197, 257]
TOKENS = 2048  # In all images of a comparison.
ALL_LENGTHS = [n for n in range(1, 301) if n not in SOME_LENGTHS]


def draw(n: int, heads: int, c: int, b: int = 1) -> list[np.ndarray]:
  """Return x [b, n, 3·d], bias [3·d] and the gradient of the output [b, n, d] in bfloat16."""
  rng, d = np.random.default_rng(n), heads * c
  shapes = ((b, n, 3 * d), (3 * d,), (b, n, d))
  return [np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16)) for shape in shapes]


def exact(x, bias, do, heads, angles=None):
  """Return (output, gradient of x, gradient of the bias) from the formulas, in float64.

  `angles` [n, c/2] are those of rotary positions.
  """
  x, bias, do = (v.astype(np.float64) for v in (x, bias, do))
  b, n, d = do.shape
  split_heads = lambda v: v.reshape(b, n, heads, -1).transpose(0, 2, 1, 3)
  q, k, v = (split_heads(part) for part in np.split(x + bias, 3, axis=-1))
  turn = lambda v, sign: v if angles is None else turn_pairs(v, sign * angles)
  q, k = turn(q, 1), turn(k, 1)
  scale, do = q.shape[-1] ** -0.5, split_heads(do)
  p = np.exp(scale * (s := q @ k.swapaxes(2, 3)) - scale * s.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  dp = do @ v.swapaxes(2, 3)
  ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
  merge_heads = lambda v: v.transpose(0, 2, 1, 3).reshape(b, n, d)
  gradients = turn(ds @ k, -1), turn(ds.swapaxes(2, 3) @ q, -1), p.swapaxes(2, 3) @ do
  dx = np.concatenate([merge_heads(g) for g in gradients], axis=-1)
  return merge_heads(p @ v), dx, dx.sum(axis=(0, 1))


def turn_pairs(v, angles):
  """Rotate the channels i and i + c/2 of [b, heads, n, c], as the parts of complex numbers."""
  real, imaginary = np.split(v, 2, axis=-1)
  turned = (real + 1j * imaginary) * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def out_and_gradients(function, x, bias, do, heads):
  out, back = jax.vjp(lambda x, bias: function(x, bias, heads), x, bias)
  return out, *back(do)


def ours(x, bias, heads):
  return kernel.fused_attention(x, bias, heads, interpret=True)


def xla(x, bias, heads):
  """Compute what a TPU computes in bfloat16 without the kernel.

  This is the equation of `jax.nn.dot_product_attention`, rounded where XLA's program for a TPU
  rounds. Its program for a CPU keeps the gradients of weights and scores in float32.
  """
  q, k, v = split_qkv(x + bias, heads)
  scores = gradient_rounded(jnp.einsum('bnhc,bmhc->bhnm', q, k, preferred_element_type=jnp.float32))
  p = gradient_rounded(jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)).astype(v.dtype)
  return jnp.einsum('bhnm,bmhc->bnhc', p, v).reshape(*x.shape[:-1], -1)


def gradient_rounded(x):
  """Return `x`; round its gradient to bfloat16, as a matrix unit rounds inputs and outputs."""
  same = jax.custom_vjp(lambda x: x)
  same.defvjp(
    lambda x: (x, None),
    lambda _, grad: (jax.lax.reduce_precision(grad, exponent_bits=8, mantissa_bits=7),),
  )
  return same(x)


def errors(function, arrays, heads) -> list[float]:
  """Return the relative errors of output and gradients in the Euclidean norm."""
  results = out_and_gradients(function, *arrays, heads)
  norm = lambda v: np.linalg.norm(v.astype(np.float64).ravel())
  return [
    norm(np.asarray(actual, np.float64) - expected) / max(norm(expected), 1e-9)
    for actual, expected in zip(results, exact(*arrays, heads), strict=True)
  ]


def excess(n: int, heads: int, c: int) -> float:
  """Return the kernel's error minus XLA's, the worst of output and gradients.

  There are enough images that no single draw decides. XLA's error is increased by 0.1 %, for sums
  of the same numbers in another order.
  """
  arrays = draw(n, heads, c, b=-(-TOKENS // n))
  return np.max(
    np.subtract(errors(ours, arrays, heads), 1.001 * np.array(errors(xla, arrays, heads)))
  )


@pytest.mark.parametrize('n', SOME_LENGTHS)
def test_the_kernel_is_as_accurate_as_xla_in_bfloat16(n):
  assert excess(n, heads=2, c=64) <= 0


@pytest.mark.slow
@pytest.mark.parametrize('n', [*ALL_LENGTHS, 576, 577, 640, 641, 785, 1024, 1025, 1370])
def test_the_kernel_is_as_accurate_as_xla_at_every_length(n):
  assert excess(n, heads=2, c=64) <= 0


@pytest.mark.parametrize(
  ('heads', 'c'),
  [(1, 64), (3, 64), (5, 32), (16, 72), (8, 80), (3, 88), (4, 96), (2, 104), (3, 128)],
)
def test_heads_that_share_registers_are_not_mixed(heads, c):
  assert excess(50, heads, c) <= 0


@pytest.mark.parametrize(('name', 'value'), [('QUERY_BLOCK', 32), ('MAX_UNROLLED_SCORES', 1)])
def test_query_blocks_and_head_groups_do_not_change_the_error(name, value, monkeypatch):
  arrays = draw(70, 4, 64)
  expected = errors(ours, arrays, 4)
  monkeypatch.setattr(kernel, name, value)
  jax.clear_caches()
  np.testing.assert_allclose(errors(ours, arrays, 4), expected, rtol=0.05)
  jax.clear_caches()


@pytest.mark.parametrize('query_block', [640, 16])
@pytest.mark.parametrize(('heads', 'c'), [(1, 64), (3, 64), (4, 32), (4, 96), (2, 128)])
def test_queries_keys_and_their_gradients_are_rotated(heads, c, query_block, monkeypatch):
  monkeypatch.setattr(kernel, 'QUERY_BLOCK', query_block)
  arrays = [np.asarray(x, np.float32) for x in draw(37, heads, c, b=2)]
  rope = RotaryPositions((5, 7), 1, 100.0)
  angles = np.pad(rotation_angles(rope.grid, c, rope.theta), ((1, 1), (0, 0)))
  rotation = rotation_factors(rope, 37, c).astype(np.float32)
  run = lambda x, bias, heads: kernel.fused_attention(x, bias, heads, True, rotation)
  for pair in zip(
    out_and_gradients(run, *arrays, heads), exact(*arrays, heads, angles), strict=True
  ):
    np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-4)


def test_a_kernel_per_device_equals_one_kernel():
  arrays = draw(20, 2, 64, b=8)
  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  rows = PartitionSpec(('data', 'fsdp'))
  run = lambda x, bias: kernel.fused_attention(x, bias, 2, True)
  sharded = jax.shard_map(
    run, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False
  )
  results = out_and_gradients(lambda x, bias, heads: sharded(x, bias), *arrays, 2)
  for pair in zip(results, out_and_gradients(ours, *arrays, 2), strict=True):
    actual, expected = (np.asarray(x, np.float32) for x in pair)
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.02)


def test_shapes_that_exceed_the_chips_memory_are_not_supported():
  shapes = [(197, 768, 12), (577, 1024, 16), (257, 1664, 16), (1025, 768, 12), (1370, 1024, 16)]
  supported = lambda chip: [kernel.is_supported(*shape, chip) for shape in shapes]
  assert supported('TPU v5 lite') == [True] * 5
  assert supported('TPU v4') == [True, False, False, False, False]
  assert not kernel.is_supported(4097, 768, 12, 'TPU v5 lite')
  # No fewer than sixteen heads of 104 channels end with a register.
  assert not kernel.is_supported(1025, 1664, 16, 'TPU v5 lite')
