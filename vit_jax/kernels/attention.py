"""TPU kernel for self-attention over the few hundred tokens of a Vision Transformer.

The kernel computes softmax(q kᵀ / √c) v of one image at a time in vector memory. It reads q, k and
v where the fused projection left them, and writes their gradients there. No n x n array leaves
vector memory, and only qkv is kept for the backward pass.

The kernel adds the bias of the projection, because the bias gradient is a sum of values that the
kernel holds anyway. XLA's own sum over b and n costs up to a sixth of the block's matrix products.

A score matrix is held as [keys, queries]. The softmax then reduces over sublanes, which needs no
shuffling, and of the five products of the backward pass only dq needs a transpose.

With rotary positions, the kernel rotates the queries and keys that it reads, and rotates their
gradients back: outside, this would read and write qkv once more in each direction.

Shapes: b images, n tokens, h heads, c channels of a head, d = h·c.
`qkv` is [b, n, 3·d]: the queries of all heads, then the keys, then the values.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # Lanes of a vector register; stores begin at multiples of it.
QUERY_BLOCK = 640  # Most queries at a time, since their scores against all keys must fit.
# Most scores in straight-line code, where heads begin at registers: 16 heads of 256 tokens.
MAX_UNROLLED_SCORES = 2**20
# Most scores where heads share registers; beyond it, a kernel takes minutes to compile.
MAX_SHARED_LANE_SCORES = 2**22
VMEM_LIMIT = 63 * 2**20  # Bytes of vector memory that a kernel may use.
VMEM_LIMIT_BY_CHIP = {'TPU v4': 16 * 2**20}  # Chips with less.

dot_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
CONTRACT_X_YT = (((1,), (1,)), ((), ()))  # x yᵀ
CONTRACT_XT_Y = (((0,), (0,)), ((), ()))  # xᵀ y
CONTRACT_X_Y = (((1,), (0,)), ((), ()))  # x y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused_attention(
  x: jax.Array,
  bias: jax.Array,
  heads: int,
  interpret: bool = False,
  rotation: jax.Array | None = None,
) -> jax.Array:
  """Return the self-attention [b, n, d] of qkv = x [b, n, 3·d] + bias [3·d].

  The softmax is in float32. With `interpret`, the kernel runs without a TPU, slowly. `rotation`
  [3, n, c] rotates queries and keys (`rotation_factors` in models/rope.py); it is a constant.
  """
  return _attention_fwd(x, bias, heads, interpret, rotation)[0]


def is_supported(
  n: int, d: int, heads: int, chip: str, itemsize: int = 2, *, rope: bool = False
) -> bool:
  """Return whether `fused_attention` fits into the chip's vector memory and compiles quickly.

  The memory is two copies of the kernel's blocks, and some score matrices. Their number is what
  the compilers for v4 and v5p were measured to hold at a time.

  Args:
    n: Tokens per image.
    d: Width of all heads.
    heads: Number of heads.
    chip: Device kind as JAX names it, such as 'TPU v4'.
    itemsize: Bytes per element.
    rope: Whether the kernel rotates queries and keys.
  """
  rows, columns = -(-n // 8) * 8, -(-min(n, QUERY_BLOCK) // LANES) * LANES
  heads_per_group = min(heads, math.lcm(d // heads, LANES) // (d // heads))
  scores = (1 + 0.8 * heads_per_group) * (1 if n <= QUERY_BLOCK else 2.2)
  memory = 2 * rows * 7 * d * itemsize + scores * rows * columns * 4
  memory += 2 * rows * 3 * heads_per_group * (d // heads) * 4 if rope else 0
  limit = VMEM_LIMIT_BY_CHIP.get(chip, VMEM_LIMIT)
  return memory <= limit and heads_per_group * n * n <= MAX_SHARED_LANE_SCORES


def _attention_fwd(x, bias, heads, interpret, rotation):
  qkv = x + bias
  n, d = x.shape[1], x.shape[2] // 3
  outs = [((n, d), x.dtype)]
  call = functools.partial(_call_kernel, heads=heads, interpret=interpret, rotation=rotation)
  (out,) = call(_forward, 'attention_forward', [qkv], outs)
  return out, (qkv, bias, rotation)


def _attention_bwd(heads, interpret, saved, do):
  (qkv, bias, rotation), (n, d) = saved, do.shape[1:]
  outs = [((n, 3 * d), qkv.dtype), ((1, 3 * d), jnp.float32)]
  call = functools.partial(_call_kernel, heads=heads, interpret=interpret, rotation=rotation)
  dqkv, sums = call(_backward, 'attention_backward', [qkv, do], outs)
  no_gradient = None if rotation is None else jnp.zeros_like(rotation)
  return dqkv, sums.sum(axis=(0, 1)).astype(bias.dtype), no_gradient


fused_attention.defvjp(_attention_fwd, _attention_bwd)


def _call_kernel(
  kernel,
  name: str,
  arrays: list[jax.Array],
  outs: list[tuple[tuple[int, int], jnp.dtype]],
  *,
  heads: int,
  interpret: bool,
  rotation: jax.Array | None,
):
  """Run `kernel` on every image and group of heads.

  The blocks of an image stay in vector memory while the kernel runs on one group after another.

  Args:
    kernel: `_forward` or `_backward`.
    name: Name of the kernel in the compiled program.
    arrays: Inputs [b, rows, columns]; the first has 3·d columns.
    outs: (rows, columns) and dtype of each output.
    heads: Number of heads.
    interpret: Whether to run without a TPU.
    rotation: As in `fused_attention`.

  Returns:
    The outputs, each [b, rows, columns].
  """
  b, n, d = *arrays[0].shape[:2], arrays[0].shape[2] // 3
  c = d // heads
  step = _columns_per_step(n, d, c)
  block = lambda shape: pl.BlockSpec((1, *shape), lambda image, group: (image, 0, 0))
  in_specs = [block(x.shape[1:]) for x in arrays]
  if rotation is not None:
    rotation = jnp.tile(rotation, min(math.lcm(c, LANES), d) // c).astype(jnp.float32)
    arrays = [*arrays, rotation]
    in_specs.append(pl.BlockSpec(rotation.shape, lambda image, group: (0, 0, 0)))
  return pl.pallas_call(
    functools.partial(kernel, c=c, step=step),
    grid=(b, d // step),
    in_specs=in_specs,
    out_specs=[block(shape) for shape, _ in outs],
    out_shape=[jax.ShapeDtypeStruct((b, *shape), dtype) for shape, dtype in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT
    ),
    name=name,
    interpret=interpret,
  )(*arrays)


def _columns_per_step(n: int, d: int, c: int) -> int:
  """Return the columns of q that one grid step handles.

  This is all of them, unless the unrolled code would be long. Then it is the least number that
  both registers and heads divide.
  """
  width = math.lcm(c, LANES)
  return d if d % width or (d // c) * n * n <= MAX_UNROLLED_SCORES else width


def _forward(qkv_ref, *refs, c: int, step: int):
  """Compute some heads of one image: qkv [1, n, 3·d] -> their columns of the output [1, n, d].

  The factors of a rotation [3, n, columns of a group] may be between the two.
  """
  *rotation, o_ref = refs
  n, d = o_ref.shape[1:]
  for columns in _column_groups(d, c, step):
    for rows in _query_blocks(n):
      q, k = (_load_heads(qkv_ref, part * d, columns, c, *rotation) for part in range(2))
      v = _load_heads(qkv_ref, 2 * d, columns, c)
      out = []
      for head in range(len(q)):
        p = _softmax(q[head][rows], k[head])
        out.append(dot_float32(p.astype(o_ref.dtype), v[head], CONTRACT_XT_Y))
      _store_columns(o_ref, rows, 0, columns, jnp.concatenate(out, axis=1))


def _backward(qkv_ref, do_ref, *refs, c: int, step: int):
  """Compute the gradients of some heads of one image.

  Reads qkv [1, n, 3·d], the gradient of the output [1, n, d], and the factors of a rotation, if
  any. Writes the columns of these heads in the gradient of qkv [1, n, 3·d] and in its sum over
  tokens [1, 1, 3·d].
  """
  *rotation, dqkv_ref, sums_ref = refs
  n, d = do_ref.shape[1:]
  for columns in _column_groups(d, c, step):
    q, k = (_load_heads(qkv_ref, part * d, columns, c, *rotation) for part in range(2))
    v = _load_heads(qkv_ref, 2 * d, columns, c)
    do = _load_heads(do_ref, 0, columns, c)
    dk, dv, sums = [0.0] * len(q), [0.0] * len(q), 0.0
    for rows in _query_blocks(n):
      dq = []
      for head in range(len(q)):
        p = _softmax(q[head][rows], k[head])
        dp = dot_float32(v[head], do[head][rows], CONTRACT_X_YT)  # [keys, queries], like p.
        ds = (p * (dp - (p * dp).sum(axis=0, keepdims=True))).astype(do_ref.dtype)
        dq.append(dot_float32(ds, k[head], CONTRACT_XT_Y))
        dk[head] += dot_float32(ds, q[head][rows], CONTRACT_X_Y)
        dv[head] += dot_float32(p.astype(do_ref.dtype), do[head][rows], CONTRACT_X_Y)
      dq = _rotate_back(jnp.concatenate(dq, axis=1) * c**-0.5, rows, c, *rotation)
      sums += _store_columns(dqkv_ref, rows, 0, columns, dq)
    _store_columns(sums_ref, slice(0, 1), 0, columns, sums)
    rows = slice(0, n)
    dk = _rotate_back(jnp.concatenate(dk, axis=1) * c**-0.5, rows, c, *rotation)
    for part, grads in ((1, dk), (2, jnp.concatenate(dv, axis=1))):
      sums = _store_columns(dqkv_ref, rows, part * d, columns, grads)
      _store_columns(sums_ref, slice(0, 1), part * d, columns, sums)


def _softmax(q, k):
  """Return the attention weights [keys, queries] in float32 of q [queries, c] and k [keys, c]."""
  scores = dot_float32(k, q, CONTRACT_X_YT) * (q.shape[-1] ** -0.5 * math.log2(math.e))
  p = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
  return p * (1 / p.sum(axis=0, keepdims=True))


def _column_groups(d: int, c: int, step: int) -> list[tuple[int | jax.Array, int]]:
  """Return (first column, width) of each group of heads that this grid step handles.

  A group is the fewest heads that begin and end at a register.
  """
  width = math.lcm(c, LANES)
  if step == d:
    return [(first, min(width, d - first)) for first in range(0, d, width)]
  begin = pl.program_id(1) * step
  return [(pl.multiple_of(begin + first, LANES), width) for first in range(0, step, width)]


def _query_blocks(n: int) -> list[slice]:
  """Split `n` rows into blocks of at most QUERY_BLOCK."""
  return [slice(first, min(first + QUERY_BLOCK, n)) for first in range(0, n, QUERY_BLOCK)]


def _load_heads(
  ref, begin: int, columns: tuple[int | jax.Array, int], c: int, rotation_ref=None
) -> list[jax.Array]:
  """Return the heads [n, c] in a group of columns, from column `begin`, rotated if asked."""
  x = ref[0, :, pl.ds(begin + columns[0], columns[1])]
  if rotation_ref is not None:
    x = _rotate(x.astype(jnp.float32), slice(0, x.shape[0]), c, rotation_ref).astype(x.dtype)
  return [x[:, first : first + c] for first in range(0, columns[1], c)]


def _rotate(x: jax.Array, rows: slice, c: int, rotation_ref, sign: int = 1) -> jax.Array:
  """Rotate the pairs of channels in the heads of float32 x [rows, columns].

  Values that a roll moves from one head to another meet factors of zero.
  """
  cos, from_right, from_left = (rotation_ref[i, rows, : x.shape[1]] for i in range(3))
  moved = _roll(x, -c // 2) * from_right + _roll(x, c // 2) * from_left
  return x * cos + sign * moved


def _rotate_back(x: jax.Array, rows: slice, c: int, *rotation_ref) -> jax.Array:
  """Apply the inverse, which is also the transpose, of `_rotate`, if there is a rotation."""
  return _rotate(x, rows, c, *rotation_ref, sign=-1) if rotation_ref else x


def _roll(x: jax.Array, shift: int) -> jax.Array:
  """Move the columns of x by `shift` to the right."""
  columns = x.shape[1]
  return pltpu.roll(x, shift % columns, 1) if columns % LANES == 0 else jnp.roll(x, shift, axis=1)


def _store_columns(
  ref, rows: slice, begin: int, columns: tuple[int | jax.Array, int], x: jax.Array
) -> jax.Array:
  """Store x [rows, columns] in a group of columns counted from column `begin`.

  Returns its sum over the rows in float32, [1, columns].
  """
  ref[0, rows, pl.ds(begin + columns[0], columns[1])] = x.astype(ref.dtype)
  return x.sum(axis=0, keepdims=True)
