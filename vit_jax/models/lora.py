"""Low-rank adapters (LoRA, arXiv 2106.09685) for the kernels of any model.

A kernel W [*in, *out] with an adapter has two arrays beside it in the parameter tree: `lora_a`, A
[*in, r], and `lora_b`, B [r, *out]. The model computes with W + alpha / r · A B. B starts at zero.
Arrays of stacked blocks have the depth as their leading axis.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Config, LoraConfig, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.layers import BLOCK_PATH_PREFIX, BLOCKS

# Kernels [d, h, c] with two axes of outputs: heads and channels. All others have one.
HEADS_KERNEL = re.compile(r'.*/(query|key|value)/kernel')
ADAPTER_ARRAYS = ('lora_a', 'lora_b')


@dataclasses.dataclass(frozen=True, slots=True)
class LoraModel:
  """A linen module whose parameters have adapters.

  It offers what training and evaluation use of a module. The adapters of a stacked block are merged
  when the block runs, so that neither the merged kernels of all blocks nor their gradients exist at
  once.
  """

  base: nn.Module
  lora: LoraConfig

  @property
  def config(self) -> ModelConfig:
    """The config of the base."""
    return self.base.config

  @property
  def classes(self) -> int:
    """The number of classes."""
    return self.base.classes

  @property
  def shape(self):
    """The shape of the base."""
    return self.base.shape

  def init(self, key: jax.Array, images: jax.Array) -> dict:
    """Initialize the parameters: those of the base, and the adapters."""
    params = self.base.init(key, images)['params']
    return {'params': add_adapters(params, self.lora, key)}

  def apply(self, variables: dict, *args, **kwargs):
    """Apply the base with the merged kernels."""
    params, model, scale = variables['params'], self.base, adapter_scale(self.lora)
    if BLOCKS[0] in params and has_adapters(params[BLOCKS[0]][BLOCKS[1]]):
      model = model.clone(gather=merge_after(model.gather, scale))
    return model.apply(
      {**variables, 'params': merge_outside_blocks(params, scale)}, *args, **kwargs
    )

  def clone(self, **fields) -> 'LoraModel':
    """Return a copy whose base has other fields."""
    return dataclasses.replace(self, base=self.base.clone(**fields))


def with_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module | LoraModel:
  """Return the model with the adapters that `lora` describes, or the model itself without them."""
  return LoraModel(model, lora) if lora.rank else model


def adapter_scale(lora: LoraConfig) -> float:
  """Return the factor of the products A B."""
  return lora.alpha / lora.rank


def adapted_kernels(params: dict, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
  """Return {path: shape} of the kernels that get an adapter.

  `params` are arrays or shapes. Raises UserError if a pattern matches nothing, or if the rank is
  not below both sides of a kernel.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  kernels = {
    path: leaf.shape
    for path, leaf in flat.items()
    if path.endswith('/kernel') and len(block_shape(path, leaf.shape)) > 1
  }
  trained = match_paths(flat, lora.train, 'train') if lora.train else set()
  found = match_paths(kernels, lora.targets, 'targets') - trained
  if not found:
    raise UserError(
      f'config.lora.targets={lora.targets!r} matches only kernels that are trained themselves '
      f'(config.lora.train={lora.train!r})'
    )
  for path in sorted(found):
    sides = kernel_sides(path, kernels[path])
    if lora.rank > min(sides):
      raise UserError(
        f'config.lora.rank={lora.rank} exceeds the smaller side of {path}, which is a matrix of '
        f'{sides[0]} x {sides[1]}: use a smaller rank or other config.lora.targets'
      )
  return {path: kernels[path] for path in flat if path in found}


def match_paths(paths, pattern: str, name: str) -> set[str]:
  """Return the paths that match. Raises UserError, which names config.lora.`name`, if none does."""
  found = {path for path in paths if re.fullmatch(pattern, path)}
  if not found:
    examples = ', '.join(repr(path) for path in list(paths)[:3])
    raise UserError(
      f'config.lora.{name}={pattern!r} matches nothing; it must match a full path, such as '
      f'{examples}'
    )
  return found


def block_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape of a parameter without the depth."""
  return shape[1:] if path.startswith(BLOCK_PATH_PREFIX) else shape


def kernel_sides(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """Return the numbers of inputs and of outputs of a kernel of one block."""
  shape = block_shape(path, shape)
  split = input_axes(path, shape)
  return math.prod(shape[:split]), math.prod(shape[split:])


def input_axes(path: str, shape: tuple[int, ...]) -> int:
  """Return the number of leading axes of a kernel, without the depth, that are inputs."""
  return len(shape) - (2 if HEADS_KERNEL.fullmatch(path) and len(shape) == 3 else 1)


def add_adapters(params: dict, lora: LoraConfig, key: jax.Array) -> dict:
  """Return the parameters with new adapters beside their kernels.

  A is uniform between ±1/√in, and B is zero, as in the published code and in peft. Each A depends
  on the key and its path alone.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for path, shape in adapted_kernels(params, lora).items():
    depth = shape[: len(shape) - len(block_shape(path, shape))]
    own, bound = block_shape(path, shape), kernel_sides(path, shape)[0] ** -0.5
    split, module = input_axes(path, own), path.removesuffix('kernel')
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a_shape = (*depth, *own[:split], lora.rank)
    flat[f'{module}lora_a'] = jax.random.uniform(path_key, a_shape, minval=-bound, maxval=bound)
    flat[f'{module}lora_b'] = jnp.zeros((*depth, lora.rank, *own[split:]))
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def is_adapter(path: str) -> bool:
  """Return whether a path is that of an A or a B."""
  return path.rpartition('/')[2] in ADAPTER_ARRAYS


def has_adapters(params: dict) -> bool:
  """Return whether nested parameters have an adapter."""
  return any(is_adapter(path) for path in flax.traverse_util.flatten_dict(params, sep='/'))


def split_adapters(params: dict) -> tuple[dict, dict]:
  """Return nested parameters without their adapters, and the adapters."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  parts = (
    {path: x for path, x in flat.items() if is_adapter(path) == own} for own in (False, True)
  )
  rest, adapters = (flax.traverse_util.unflatten_dict(part, sep='/') for part in parts)
  return rest, adapters


def join_adapters(params: dict, adapters: dict) -> dict:
  """Return the inverse of `split_adapters`."""
  flat, own = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (params, adapters))
  return flax.traverse_util.unflatten_dict(flat | own, sep='/')


def frozen_paths(params: dict, lora: LoraConfig) -> list[str]:
  """Return the paths of the parameters that are neither adapters nor trained themselves."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return [p for p in flat if not is_adapter(p) and not re.fullmatch(lora.train, p)]


def check_new_head(frozen: list[str], config: Config):
  """Raise UserError if a head that starts at zero is among the frozen paths."""
  if config.init_head == 'new' and (found := [p for p in frozen if p.startswith('head/')]):
    raise UserError(
      f'config.lora.train={config.lora.train!r} does not match {found[0]}, which config.init_head='
      "'new' starts at zero: it would never be trained. Use config.init_head=keep or probe, or "
      "another config.lora.train, such as 'head/.*'"
    )


def merge_adapters(flat: dict[str, np.ndarray], lora: LoraConfig) -> dict[str, np.ndarray]:
  """Return a flat tree of NumPy arrays with W + alpha / r · A B in place of each W, A and B."""
  merged = {path: array for path, array in flat.items() if not is_adapter(path)}
  for path in [path for path in merged if path.endswith('kernel')]:
    a, b = (flat.get(f'{path.removesuffix("kernel")}{name}') for name in ADAPTER_ARRAYS)
    if a is not None:
      depth, rank = a.shape[: path.startswith(BLOCK_PATH_PREFIX)], a.shape[-1]
      product = a.reshape(*depth, -1, rank) @ b.reshape(*depth, rank, -1)
      delta = np.float32(adapter_scale(lora)) * product
      merged[path] = merged[path] + delta.reshape(merged[path].shape)
  return merged


def merge_after(gather: Callable | None, scale: float) -> Callable[[dict], dict]:
  """Return a function that gathers the parameters of a block and merges its adapters."""

  def gather_and_merge(block: dict) -> dict:
    block = gather(block) if gather else block
    return {'params': merge_tree(block['params'], scale)}

  return gather_and_merge


def merge_outside_blocks(params: dict, scale: float) -> dict:
  """Return nested parameters with merged kernels, except in the stacked blocks."""
  if BLOCKS[0] not in params:
    return merge_tree(params, scale)
  encoder = dict(params[BLOCKS[0]])
  blocks = encoder.pop(BLOCKS[1])
  merged = merge_tree(params | {BLOCKS[0]: encoder}, scale)
  return merged | {BLOCKS[0]: merged.get(BLOCKS[0], {}) | {BLOCKS[1]: blocks}}


def merge_tree(params: dict, scale: float) -> dict:
  """Return nested parameters without a depth axis, with each W, A and B replaced by their sum."""
  merged = {
    name: merge_tree(value, scale) if isinstance(value, dict) else value
    for name, value in params.items()
    if name not in ADAPTER_ARRAYS
  }
  if ADAPTER_ARRAYS[0] in params:
    merged['kernel'] = merge_kernel(params['kernel'], *(params[n] for n in ADAPTER_ARRAYS), scale)
  return merged


def merge_kernel(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Return W + scale · A B in float32, with gradients for A and B alone.

  It is a `linear_call`, so that a block does not keep its result for the backward pass
  (REGATHERED_PRIMITIVES in vit.py). The function is linear in A, B and the number 1, around the
  values A0 and B0 of A and B: 1 · W + scale · (A B0 + A0 B - 1 · A0 B0). Its value and its
  derivatives at A0 and B0 are those of W + scale · A B.
  """
  w_matrix = w.reshape(math.prod(a.shape[:-1]), -1)
  a, b = a.reshape(w_matrix.shape[0], -1), b.reshape(-1, w_matrix.shape[1])
  w_matrix, a, b = (x.astype(jnp.float32) for x in (w_matrix, a, b))
  matmul = functools.partial(jnp.matmul, precision='highest')
  bounds = (a.size, a.size + b.size)

  def forward(fixed, linear):
    w, a0, b0 = fixed
    a, b, one = jnp.split(linear, bounds)
    product = matmul(a.reshape(a0.shape), b0) + matmul(a0, b.reshape(b0.shape))
    return one * w + scale * (product - one * matmul(a0, b0))

  def transpose(fixed, grad):
    _, a0, b0 = fixed
    gradients = matmul(grad, b0.T), matmul(a0.T, grad)
    return jnp.concatenate([scale * x.ravel() for x in gradients] + [jnp.zeros(1)])

  linear = jnp.concatenate([a.ravel(), b.ravel(), jnp.ones(1)])
  fixed = jax.lax.stop_gradient((w_matrix, a, b))
  return jax.custom_derivatives.linear_call(forward, transpose, fixed, linear).reshape(w.shape)
