"""softmax(q kᵀ / √c) v for every head: which kernel computes it, and when.

Shapes: b batch, n m tokens, h heads, c channels of a head, d = h·c. `qkv` is [b, n, 3·d]: all of q, all of k, all of v.
"""

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vit_jax.errors import UserError
from vit_jax.kernels import attention as kernel
from vit_jax.models.layers import RelativePositionBias
from vit_jax.sharding.mesh import compilation_target


def self_attention(x: jax.Array, bias: jax.Array, heads: int, how: str) -> jax.Array:
  """Of qkv = x [b, n, 3·d] + bias [3·d] -> [b, n, d].

  `how`: xla, pallas (TPU), cudnn (GPU), or auto, which takes what the devices have.
  """
  return ATTENTION_IMPLEMENTATIONS[choose_implementation(x, heads) if how == 'auto' else how](
    x, bias, heads
  )


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """[b, n, h, c] queries over [b, m, h, c] keys and values -> [b, n, h, c]. The softmax is in float32.

  A bias [b, h, n, m] is added to the scores.

  Heads come before tokens while it lasts, so that every product is a plain batch of matrices, and the softmax is divided
  out of its n x c results rather than its n x m weights: 8 % of a Ti/16 step on a CPU against the textbook's order.
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
  """[b, n, h, c] queries over [b, m, h, c] keys -> [b, h, n, m]: what each query takes of each value, to look at."""
  scores = jnp.einsum(
    'bnhc,bmhc->bhnm', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)


def split_qkv(qkv: jax.Array, heads: int) -> list[jax.Array]:
  """[b, n, 3·d] -> q, k and v, each [b, n, h, c]."""
  return [x.reshape(*x.shape[:-1], heads, -1) for x in jnp.split(qkv, 3, axis=-1)]


def xla_attention(x: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
  """What the compiler makes of `attend`; a TPU has layouts of its own, and wants the plain equation."""
  q, k, v = split_qkv(x + bias, heads)
  out = (
    jax.nn.dot_product_attention(q, k, v, implementation='xla')
    if compilation_target()[0] == 'tpu'
    else attend(q, k, v)
  )
  return out.reshape(*x.shape[:-1], -1)


def cudnn_attention(x: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
  """NVIDIA's fused kernel."""
  return jax.nn.dot_product_attention(*split_qkv(x + bias, heads), implementation='cudnn').reshape(
    *x.shape[:-1], -1
  )


def pallas_attention(x: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
  """Our TPU kernel. Each device takes its own images: where nobody has split them yet (a train step has), this does."""
  n, d = x.shape[-2], x.shape[-1] // 3
  platform, chip = compilation_target()
  if not kernel.is_supported(n, d, heads, chip, x.dtype.itemsize):
    raise UserError(
      f"config.model.attention='pallas': {n} tokens in {heads} heads of {d // heads} are too many on {chip}; use 'xla'"
    )
  run = functools.partial(kernel.fused_attention, heads=heads, interpret=platform != 'tpu')
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
  if not axes:
    return run(x, bias)
  rows = PartitionSpec(axes)
  return jax.shard_map(run, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)(
    x, bias
  )


ATTENTION_IMPLEMENTATIONS = {
  'xla': xla_attention,
  'pallas': pallas_attention,
  'cudnn': cudnn_attention,
}


def choose_implementation(x: jax.Array, heads: int) -> str:
  """What `auto` means for these tokens: in bfloat16 the devices' own kernel, where it takes them and does what it should."""
  n, d = x.shape[-2], x.shape[-1] // 3
  if x.dtype != jnp.bfloat16:
    return 'xla'
  platform, chip = compilation_target()
  if platform == 'tpu':
    here = jax.default_backend() == 'tpu'
    return (
      'pallas'
      if kernel.is_supported(n, d, heads, chip) and (not here or is_kernel_accurate(n, d, heads))
      else 'xla'
    )
  c = d // heads
  return 'cudnn' if platform in ('gpu', 'cuda') and c % 8 == 0 and c <= 128 else 'xla'


@functools.cache
def is_kernel_accurate(n: int, d: int, heads: int) -> bool:
  """Whether the kernel agrees with `xla_attention` on this hardware, output and gradient, on random data; a warning if not.

  In a thread of its own, where no trace and no mesh are in force.
  """
  with ThreadPoolExecutor(1) as thread:
    error = thread.submit(kernel_relative_error, n, d, heads).result()
  agrees = error <= 0.02  # Not so of a NaN.
  if not agrees:
    what = f'{n} tokens in {heads} heads of {d // heads}'
    warnings.warn(f'the attention kernel is off by {error:.1%} on {what}: using XLA', stacklevel=2)
  return agrees


def kernel_relative_error(n: int, d: int, heads: int) -> float:
  """The kernel's largest relative error against `xla_attention` in float32; NaN where it has made one."""
  shapes = {'x': (2, n, 3 * d), 'bias': (3 * d,), 'do': (2, n, d)}
  x, bias, do = (
    jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    for i, shape in enumerate(shapes.values())
  )

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def both(function, dtype, x, bias, do):
    out, back = jax.vjp(
      functools.partial(function, heads=heads), x.astype(dtype), bias.astype(dtype)
    )
    return out, *back(do.astype(dtype))

  ours = both(pallas_attention, jnp.bfloat16, x, bias, do)
  with jax.default_matmul_precision('float32'):
    theirs = both(xla_attention, jnp.float32, x, bias, do)
  off = lambda x, y: jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())
  return float(
    jnp.array([off(x.astype(jnp.float32), y) for x, y in zip(ours, theirs, strict=True)]).max()
  )


xavier_init = functools.partial(nn.initializers.variance_scaling, 1.0, 'fan_avg', 'uniform')


class LinearParams(nn.Module):
  """The kernel and bias of a linear map, for callers that multiply in their own way."""

  shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  initializer: Callable
  dtype: jnp.dtype

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    kernel = self.param('kernel', self.initializer, self.shape)
    bias = self.param('bias', nn.initializers.zeros, self.bias_shape)
    return kernel.astype(self.dtype), bias.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head attention of `x` [b, n, d] over `context` [b, m, d], or over itself -> [b, n, d].

  Of a grid [b, h, n, d] each row attends to itself alone.
  """

  heads: int
  how: str
  dtype: jnp.dtype
  relative: bool = False  # Scores know the offset from query to key.

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    d, heads = x.shape[-1], (self.heads, x.shape[-1] // self.heads)
    affine = functools.partial(
      LinearParams, (d, *heads), heads, xavier_init(in_axis=0, out_axis=(1, 2)), self.dtype
    )
    query, key, value = (affine(name=name)() for name in ('query', 'key', 'value'))
    kernel, bias = LinearParams(
      (*heads, d), (d,), xavier_init(in_axis=(0, 1), out_axis=2), self.dtype, name='out'
    )()
    if context is None:
      qkv_kernel, qkv_bias = fuse_qkv(query, key, value)
      rows = x.reshape(-1, *x.shape[-2:])
      qkv = checkpoint_name(rows @ qkv_kernel.T, 'qkv')  # [b, n, 3·d], and one product
      q, k, v = split_qkv(qkv + qkv_bias, self.heads)
      offsets = RelativePositionBias(name='relative')(q) if self.relative else None
      if x.ndim == 3:
        self.look(q, k, offsets)
      out = (
        attend(q, k, v, offsets)
        if self.relative
        else self_attention(qkv, qkv_bias, self.heads, self.how)
      )
    else:
      affine = lambda x, w, b: (x @ w.T + b).reshape(*x.shape[:-1], -1, heads[1])
      q = affine(x, *fuse_qkv(query))
      k, v = jnp.split(affine(context, *fuse_qkv(key, value)), 2, axis=2)
      self.look(q, k)
      out = attend(q, k, v)
    return checkpoint_name(
      checkpoint_name(out.reshape(x.shape), 'attended') @ kernel.reshape(d, d) + bias, 'projected'
    )

  def look(self, q: jax.Array, k: jax.Array, offsets: jax.Array | None = None):
    """Keeps the attention weights where somebody asks for them: mutable=['attention']."""
    if self.is_mutable_collection('attention') and not self.is_initializing():
      self.sow('attention', 'weights', attention_weights(q, k, offsets))


def fuse_qkv(*affines: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Linear maps [d, h, c] with biases [h, c] as one, for one matrix product: [maps·h·c, d] and [maps·h·c].

  Transposed, as a TPU holds them: there c would be padded to 128 if it came last.
  """
  kernels, biases = zip(*affines, strict=True)
  kernels = [einops.rearrange(kernel, 'd h c -> (h c) d') for kernel in kernels]
  return jnp.concatenate(kernels), jnp.concatenate([bias.reshape(-1) for bias in biases])
