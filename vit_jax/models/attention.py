"""Multi-head attention, softmax(q kᵀ / √c) v, and the choice of the kernel that computes it.

Shapes: b batch, n m tokens, h heads, c channels of a head, d = h·c width.
`qkv` is [b, n, 3·d]: the queries of all heads, then the keys, then the values.
"""

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vit_jax.errors import UserError
from vit_jax.kernels import attention as attention_kernel
from vit_jax.models.rope import RotaryPositions, rotation_factors
from vit_jax.sharding.mesh import compilation_target

xavier_init = functools.partial(nn.initializers.variance_scaling, 1.0, 'fan_avg', 'uniform')
# Values of config.model.qkv_bias -> projections with a bias.
BIASED_PROJECTIONS = {'qkv': ('query', 'key', 'value'), 'qv': ('query', 'value'), 'none': ()}
MAX_KERNEL_ERROR = 0.02  # Relative to XLA in float32, in the Euclidean norm.


class Attention(nn.Module):
  """Multi-head attention of `x` [b, n, d] over `context` [b, m, d], or over itself -> [b, n, d].

  Given tokens on their grid [b, h, n, d], each row attends to itself alone.
  """

  heads: int
  implementation: str
  dtype: jnp.dtype
  # Makes the module that returns a bias of the scores, given the queries.
  make_score_bias: Callable | None = None
  qkv_bias: str = 'qkv'  # The projections with a bias, a key of BIASED_PROJECTIONS.
  qk_norm: Callable | None = None  # Makes the norms of queries and keys.
  rope: RotaryPositions | None = None  # Rotation of queries and keys.

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    d, heads = x.shape[-1], (self.heads, x.shape[-1] // self.heads)
    in_init = xavier_init(in_axis=0, out_axis=(1, 2))
    in_params = functools.partial(LinearParams, (d, *heads), heads, in_init, self.dtype)
    query, key, value = (
      in_params(name in BIASED_PROJECTIONS[self.qkv_bias], name=name)()
      for name in ('query', 'key', 'value')
    )
    out_init = xavier_init(in_axis=(0, 1), out_axis=2)
    out_kernel, out_bias = LinearParams((*heads, d), (d,), out_init, self.dtype, name='out')()
    if context is None:
      qkv_kernel, qkv_bias = fuse_qkv(query, key, value)
      rows = x.reshape(-1, *x.shape[-2:])
      qkv = checkpoint_name(rows @ qkv_kernel.T, 'qkv')  # [b, n, 3·d] from one matrix product.
      if self.qk_norm is not None:
        qkv = self.norm_queries_and_keys(qkv + qkv_bias)
        qkv_bias = jnp.zeros_like(qkv_bias)  # The kernels add a bias.
      q, k, v = split_qkv(rotate(qkv + qkv_bias, self.heads, self.rope), self.heads)
      score_bias = self.make_score_bias()(q) if self.make_score_bias else None
      if x.ndim == 3:
        self.sow_attention(q, k, score_bias)
      if self.make_score_bias:
        out = attend(q, k, v, score_bias)
      else:
        out = self_attention(qkv, qkv_bias, self.heads, self.implementation, self.rope)
    else:
      linear = lambda x, kernel, bias: (x @ kernel.T + bias).reshape(*x.shape[:-1], -1, heads[1])
      q = linear(x, *fuse_qkv(query))
      k, v = jnp.split(linear(context, *fuse_qkv(key, value)), 2, axis=2)
      self.sow_attention(q, k)
      out = attend(q, k, v)
    out = checkpoint_name(out.reshape(x.shape), 'attended')
    return checkpoint_name(out @ out_kernel.reshape(d, d) + out_bias, 'projected')

  def norm_queries_and_keys(self, qkv: jax.Array) -> jax.Array:
    """Normalize the queries and keys of [b, n, 3·d]."""
    q, k, v = split_qkv(qkv, self.heads)
    q, k = self.qk_norm(name='query_norm')(q), self.qk_norm(name='key_norm')(k)
    return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in (q, k, v)], axis=-1)

  def sow_attention(self, q: jax.Array, k: jax.Array, bias: jax.Array | None = None):
    """Sow the attention weights [b, h, n, m] if the collection 'attention' is mutable."""
    if self.is_mutable_collection('attention') and not self.is_initializing():
      self.sow('attention', 'weights', attention_weights(q, k, bias))


class LinearParams(nn.Module):
  """Kernel and bias of a linear map, for callers that do the multiplication themselves.

  Without `use_bias`, the bias is a constant of zeros.
  """

  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  initializer: Callable
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    kernel = self.param('kernel', self.initializer, self.kernel_shape)
    if not self.use_bias:
      return kernel.astype(self.dtype), jnp.zeros(self.bias_shape, self.dtype)
    bias = self.param('bias', nn.initializers.zeros, self.bias_shape)
    return kernel.astype(self.dtype), bias.astype(self.dtype)


def fuse_qkv(*linear_maps: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Fuse linear maps into one, so that one matrix product computes them all.

  Args:
    *linear_maps: (kernel [d, h, c], bias [h, c]) of each map, such as query, key and value.

  Returns:
    A kernel [maps·h·c, d] and a bias [maps·h·c]. The kernel is transposed, as a TPU lays it out:
    with c as its last axis, c would be padded to 128.
  """
  kernels, biases = zip(*linear_maps, strict=True)
  kernels = [einops.rearrange(kernel, 'd h c -> (h c) d') for kernel in kernels]
  return jnp.concatenate(kernels), jnp.concatenate([bias.reshape(-1) for bias in biases])


def split_qkv(qkv: jax.Array, heads: int) -> list[jax.Array]:
  """Split [b, n, 3·d] into q, k and v, each [b, n, h, c]."""
  return [x.reshape(*x.shape[:-1], heads, -1) for x in jnp.split(qkv, 3, axis=-1)]


def rotate(qkv: jax.Array, heads: int, rope: RotaryPositions | None) -> jax.Array:
  """Rotate the queries and keys of the fused projection [b, n, 3·d] if positions are rotary."""
  return rope(qkv, heads) if rope else qkv


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Compute softmax(q kᵀ / √c + bias) v, with the softmax in float32.

  Heads are moved before tokens, so every product is a plain batched matrix product. The softmax
  divides its n x c results instead of its n x m weights. Together this takes 8 % less time for a
  step of Ti/16 on a CPU than the textbook order.

  Args:
    q: Queries [b, n, h, c].
    k: Keys [b, m, h, c].
    v: Values [b, m, h, c].
    bias: Added to the scores, [b, h, n, m] or [1, h, n, m].

  Returns:
    [b, n, h, c].
  """
  q, k, v = (einops.rearrange(x, 'b n h c -> b h n c') for x in (q * q.shape[-1] ** -0.5, k, v))
  scores = jnp.einsum('bhnc,bhmc->bhnm', q, k, preferred_element_type=jnp.float32)
  scores = scores if bias is None else scores + bias
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  out = jnp.einsum(
    'bhnm,bhmc->bhnc', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  out = out / weights.sum(axis=-1)[..., None]
  return einops.rearrange(out.astype(v.dtype), 'b h n c -> b n h c')


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Return softmax(q kᵀ / √c + bias) [b, h, n, m] of q [b, n, h, c] and k [b, m, h, c].

  For inspection only: `attend` does not materialize it.
  """
  scores = jnp.einsum(
    'bnhc,bmhc->bhnm', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)


def self_attention(
  x: jax.Array,
  bias: jax.Array,
  heads: int,
  implementation: str,
  rope: RotaryPositions | None = None,
) -> jax.Array:
  """Return the self-attention [b, n, d] of qkv = x [b, n, 3·d] + bias [3·d].

  Args:
    x: The fused projection, without its bias: the TPU kernel adds the bias itself.
    bias: The bias of the fused projection.
    heads: Number of heads.
    implementation: 'xla', 'pallas' (TPU), 'cudnn' (GPU) or 'auto', which suits the devices.
    rope: The rotation of queries and keys, if any.
  """
  if implementation == 'auto':
    implementation = choose_implementation(x, heads, rope)
  return ATTENTION_IMPLEMENTATIONS[implementation](x, bias, heads, rope)


def choose_implementation(x: jax.Array, heads: int, rope: RotaryPositions | None = None) -> str:
  """Return the implementation that 'auto' stands for, given the fused projection [b, n, 3·d].

  In bfloat16 this is the devices' fused kernel, if it supports the shape. On a TPU the kernel must
  also agree with XLA on this hardware. Otherwise it is 'xla'.
  """
  if x.dtype != jnp.bfloat16:
    return 'xla'
  n, d = x.shape[-2], x.shape[-1] // 3
  c = d // heads
  platform, chip = compilation_target()
  if platform in ('gpu', 'cuda'):
    return 'cudnn' if c % 8 == 0 and c <= 128 else 'xla'
  if platform != 'tpu' or not attention_kernel.is_supported(
    n, d, heads, chip, rope=rope is not None
  ):
    return 'xla'
  # Compiling for a TPU from another machine, there is no hardware to compare on.
  can_run = jax.default_backend() == 'tpu'
  return 'pallas' if not can_run or is_kernel_accurate(n, d, heads, rope) else 'xla'


def xla_attention(
  x: jax.Array, bias: jax.Array, heads: int, rope: RotaryPositions | None = None
) -> jax.Array:
  """Compute self-attention without a hand-written kernel.

  A TPU gets the plain equation, because XLA chooses its own layouts there. Other devices get
  `attend`.
  """
  q, k, v = split_qkv(rotate(x + bias, heads, rope), heads)
  if compilation_target()[0] == 'tpu':
    out = jax.nn.dot_product_attention(q, k, v, implementation='xla')
  else:
    out = attend(q, k, v)
  return out.reshape(*x.shape[:-1], -1)


def cudnn_attention(
  x: jax.Array, bias: jax.Array, heads: int, rope: RotaryPositions | None = None
) -> jax.Array:
  """Compute self-attention with NVIDIA's fused kernel."""
  q, k, v = split_qkv(rotate(x + bias, heads, rope), heads)
  out = jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  return out.reshape(*x.shape[:-1], -1)


def pallas_attention(
  x: jax.Array, bias: jax.Array, heads: int, rope: RotaryPositions | None = None
) -> jax.Array:
  """Compute self-attention with the TPU kernel of this project; other devices interpret it.

  Each device runs the kernel on its own images. A train step already runs inside shard_map;
  elsewhere, this function splits the batch over the mesh.

  Raises UserError if the tokens do not fit into the chip's vector memory.
  """
  n, d = x.shape[-2], x.shape[-1] // 3
  platform, chip = compilation_target()
  if not attention_kernel.is_supported(n, d, heads, chip, x.dtype.itemsize, rope=rope is not None):
    raise UserError(
      f"config.model.attention='pallas': {n} tokens in {heads} heads of {d // heads} do not fit "
      f"into the memory of {chip}; use 'xla'"
    )
  rotation = None if rope is None else rotation_factors(rope, n, d // heads).astype(np.float32)
  run = functools.partial(
    attention_kernel.fused_attention,
    heads=heads,
    interpret=platform != 'tpu',
    rotation=rotation,
  )
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
  if not axes:
    return run(x, bias)
  rows = PartitionSpec(axes)
  run = jax.shard_map(run, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
  return run(x, bias)


ATTENTION_IMPLEMENTATIONS = {
  'xla': xla_attention,
  'pallas': pallas_attention,
  'cudnn': cudnn_attention,
}


@functools.cache
def is_kernel_accurate(n: int, d: int, heads: int, rope: RotaryPositions | None = None) -> bool:
  """Return whether the TPU kernel agrees with XLA on this hardware; warn if it does not.

  Compares outputs and gradients on random data. The comparison runs in a separate thread, because
  the caller may be inside a trace or a mesh context.
  """
  with ThreadPoolExecutor(1) as thread:
    error = thread.submit(kernel_relative_error, n, d, heads, rope).result()
  accurate = error <= MAX_KERNEL_ERROR  # False for NaN.
  if not accurate:
    shape = f'{n} tokens in {heads} heads of {d // heads}'
    warnings.warn(f'the attention kernel is off by {error:.1%} on {shape}: using XLA', stacklevel=2)
  return accurate


def kernel_relative_error(n: int, d: int, heads: int, rope: RotaryPositions | None = None) -> float:
  """Return the largest relative error of the kernel in bfloat16 against XLA in float32.

  The maximum is over the output and both gradients, each in the Euclidean norm. It is NaN if the
  kernel produced a NaN.
  """
  shapes = {'x': (2, n, 3 * d), 'bias': (3 * d,), 'do': (2, n, d)}
  x, bias, do = (
    jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    for i, shape in enumerate(shapes.values())
  )

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def output_and_gradients(attention, dtype, x, bias, do):
    attention = functools.partial(attention, heads=heads, rope=rope)
    out, vjp = jax.vjp(attention, x.astype(dtype), bias.astype(dtype))
    return out, *vjp(do.astype(dtype))

  def relative_error(actual, expected):
    difference = actual.astype(jnp.float32) - expected
    return jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(expected.ravel())

  actual = output_and_gradients(pallas_attention, jnp.bfloat16, x, bias, do)
  with jax.default_matmul_precision('float32'):
    expected = output_and_gradients(xla_attention, jnp.float32, x, bias, do)
  errors = [relative_error(*pair) for pair in zip(actual, expected, strict=True)]
  return float(jnp.array(errors).max())
