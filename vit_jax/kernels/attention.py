"""Self-attention for a Vision Transformer's few hundred tokens, on a TPU: softmax(q kᵀ / √c) v of whole images in fast memory.

Reads q, k and v where the fused projection left them and writes their gradients there; nothing of n x n leaves the chip's
vector memory, and only qkv is kept for the backward pass. The projection's bias is added here, since its gradient is the sum
of what the kernel has in hand: XLA's own sum over b and n costs as much as a sixth of the block's matrix products.
A score matrix is held as [keys, queries]: the softmax then reduces over sublanes, which costs no shuffling, and of the
backward pass's five products only dq's wants a transpose.

Shapes: b images, n tokens, h heads, c channels of a head, d = h·c. `qkv` is [b, n, 3·d]: all of q, all of k, all of v.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # Of a vector register: stores begin at its multiples.
QUERY_BLOCK = 640  # At most, at a time: their scores against all keys are what has to fit.
MAX_UNROLLED_SCORES = (
  2**20
)  # Scores in a straight line of code, where heads can be parted: 16 heads of 256 tokens.
MAX_SHARED_LANE_SCORES = (
  2**22
)  # And where they share registers: beyond, a kernel takes minutes to compile.
VMEM_LIMIT = 63 * 2**20  # Bytes that a kernel may take,
VMEM_LIMIT_BY_CHIP = {'TPU v4': 16 * 2**20}  # but on chips that have less.

dot_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
CONTRACT_X_YT = (((1,), (1,)), ((), ()))  # x yᵀ
CONTRACT_XT_Y = (((0,), (0,)), ((), ()))  # xᵀ y
CONTRACT_X_Y = (((1,), (0,)), ((), ()))  # x y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused_attention(
  x: jax.Array, bias: jax.Array, heads: int, interpret: bool = False
) -> jax.Array:
  """Of qkv = x [b, n, 3·d] + bias [3·d] -> [b, n, d]; the softmax is in float32. `interpret` runs it without a TPU, slowly."""
  return _attention_fwd(x, bias, heads, interpret)[0]


def is_supported(n: int, d: int, heads: int, chip: str, itemsize: int = 2) -> bool:
  """Whether `fused_attention` of n tokens of width d keeps within the chip's fast memory, and its code within what compiles soon.

  The memory is its blocks twice, and score matrices: as many as the compilers for v4 and v5p were found to hold at a time.
  """
  rows, columns = -(-n // 8) * 8, -(-min(n, QUERY_BLOCK) // LANES) * LANES
  together = min(heads, math.lcm(d // heads, LANES) // (d // heads))
  scores = (1 + 0.8 * together) * (1 if n <= QUERY_BLOCK else 2.2)
  taken = 2 * rows * 7 * d * itemsize + scores * rows * columns * 4
  return (
    taken <= VMEM_LIMIT_BY_CHIP.get(chip, VMEM_LIMIT) and together * n * n <= MAX_SHARED_LANE_SCORES
  )


def _forward(qkv_ref, o_ref, *, c: int, step: int):
  """Some heads of one image: [1, n, 3·d] -> their columns of [1, n, d]."""
  n, d = o_ref.shape[1:]
  for columns in _column_groups(d, c, step):
    for rows in _query_blocks(n):
      q, k, v = (_load_heads(qkv_ref, part * d, columns, c) for part in range(3))
      out = []
      for head in range(len(q)):
        p = _softmax(q[head][rows], k[head])
        out.append(dot_float32(p.astype(o_ref.dtype), v[head], CONTRACT_XT_Y))
      _store_heads(o_ref, rows, 0, columns, out)


def _backward(qkv_ref, do_ref, dqkv_ref, sums_ref, *, c: int, step: int):
  """Some heads of one image: [1, n, 3·d] and the gradient of its attention [1, n, d] -> their columns of [1, n, 3·d], and of
  its sum over tokens [1, 1, 3·d]."""
  n, d = do_ref.shape[1:]
  for columns in _column_groups(d, c, step):
    q, k, v = (_load_heads(qkv_ref, part * d, columns, c) for part in range(3))
    do = _load_heads(do_ref, 0, columns, c)
    dk, dv, sums = [0.0] * len(q), [0.0] * len(q), 0.0
    for rows in _query_blocks(n):
      dq = []
      for head in range(len(q)):
        p = _softmax(q[head][rows], k[head])
        dp = dot_float32(v[head], do[head][rows], CONTRACT_X_YT)  # [keys, queries], as p is.
        ds = (p * (dp - (p * dp).sum(axis=0, keepdims=True))).astype(do_ref.dtype)
        dq.append(dot_float32(ds, k[head], CONTRACT_XT_Y))
        dk[head] += dot_float32(ds, q[head][rows], CONTRACT_X_Y)
        dv[head] += dot_float32(p.astype(do_ref.dtype), do[head][rows], CONTRACT_X_Y)
      sums += _store_heads(dqkv_ref, rows, 0, columns, dq, c**-0.5)
    _store_heads(sums_ref, slice(0, 1), 0, columns, [sums])
    for part, grads, scale in ((1, dk, c**-0.5), (2, dv, 1.0)):
      sums = _store_heads(dqkv_ref, slice(0, n), part * d, columns, grads, scale)
      _store_heads(sums_ref, slice(0, 1), part * d, columns, [sums])


def _softmax(q, k):
  """[queries, c], [keys, c] -> what each query takes of each key, [keys, queries] in float32."""
  scores = dot_float32(k, q, CONTRACT_X_YT) * (q.shape[-1] ** -0.5 * math.log2(math.e))
  p = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
  return p * (1 / p.sum(axis=0, keepdims=True))


def _column_groups(d: int, c: int, step: int) -> list[tuple[int | jax.Array, int]]:
  """(first column, width) of this grid step's heads, as few at a time as begin and end with a register."""
  width = math.lcm(c, LANES)
  if step == d:
    return [(first, min(width, d - first)) for first in range(0, d, width)]
  begin = pl.program_id(1) * step
  return [(pl.multiple_of(begin + first, LANES), width) for first in range(0, step, width)]


def _load_heads(ref, begin: int, columns: tuple[int | jax.Array, int], c: int) -> list[jax.Array]:
  """The heads [n, c] that lie in these columns, counted from `begin`."""
  x = ref[0, :, pl.ds(begin + columns[0], columns[1])]
  return [x[:, first : first + c] for first in range(0, columns[1], c)]


def _store_heads(
  ref,
  rows: slice,
  begin: int,
  columns: tuple[int | jax.Array, int],
  heads: list[jax.Array],
  scale: float = 1.0,
):
  """Writes the heads [rows, c] side by side, times `scale`; their sum over the rows, in float32."""
  x = jnp.concatenate(heads, axis=1)
  x = x * scale if scale != 1 else x
  ref[0, rows, pl.ds(begin + columns[0], columns[1])] = x.astype(ref.dtype)
  return x.sum(axis=0, keepdims=True)


def _query_blocks(n: int) -> list[slice]:
  """All n rows, in blocks of QUERIES."""
  return [slice(first, min(first + QUERY_BLOCK, n)) for first in range(0, n, QUERY_BLOCK)]


def _columns_per_step(n: int, d: int, c: int) -> int:
  """Columns of a grid step: all, or where the unrolled code would be long, the least that registers and heads divide."""
  width = math.lcm(c, LANES)
  return d if d % width or (d // c) * n * n <= MAX_UNROLLED_SCORES else width


def _call_kernel(
  kernel,
  arrays: list[jax.Array],
  outs: list[tuple[tuple[int, int], jnp.dtype]],
  heads: int,
  interpret: bool,
):
  """`kernel` for every image and group of heads: arrays [b, …] -> [b, rows, columns] of each dtype in `outs`.

  An image's blocks stay where they are while its groups take turns.
  """
  b, n, d = *arrays[0].shape[:2], arrays[0].shape[2] // 3
  step = _columns_per_step(n, d, d // heads)
  block = lambda shape: pl.BlockSpec((1, *shape), lambda image, group: (image, 0, 0))
  return pl.pallas_call(
    functools.partial(kernel, c=d // heads, step=step),
    grid=(b, d // step),
    in_specs=[block(x.shape[1:]) for x in arrays],
    out_specs=[block(shape) for shape, _ in outs],
    out_shape=[jax.ShapeDtypeStruct((b, *shape), dtype) for shape, dtype in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT
    ),
    name=f'attention{kernel.__name__}',
    interpret=interpret,
  )(*arrays)


def _attention_fwd(x, bias, heads, interpret):
  qkv = x + bias
  n, d = x.shape[1], x.shape[2] // 3
  (out,) = _call_kernel(_forward, [qkv], [((n, d), x.dtype)], heads, interpret)
  return out, (qkv, bias)


def _attention_bwd(heads, interpret, saved, do):
  (qkv, bias), (n, d) = saved, do.shape[1:]
  outs = [((n, 3 * d), qkv.dtype), ((1, 3 * d), jnp.float32)]
  dqkv, sums = _call_kernel(_backward, [qkv, do], outs, heads, interpret)
  return dqkv, sums.sum(axis=(0, 1)).astype(bias.dtype)


fused_attention.defvjp(_attention_fwd, _attention_bwd)
