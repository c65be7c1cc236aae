"""TODO."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.sharding.mesh import replicated
from vit_jax.sharding.prng import fold_in_device


def all_gather_params(shares, specs, *, cast=None, grad_dtype='float32'):
  """On a device: its share of each array -> the whole arrays, gathered over 'fsdp' as `cast`, where that is said.

  The gradient of what is gathered is summed over 'fsdp' in `grad_dtype`, and each device keeps its share of the sum.
  """

  def gathered(share, spec):
    return (
      all_gather_array(share, spec.index('fsdp'), cast or share.dtype, grad_dtype)
      if 'fsdp' in spec
      else share
    )

  return jax.tree.map(gathered, shares, specs)


def all_gather_array(share: jax.Array, axis: int, dtype, grad_dtype) -> jax.Array:
  """The whole of an array that is split over 'fsdp' along `axis`, as `dtype`; its transpose sums in `grad_dtype`."""

  def collect(_, share):
    return jax.lax.all_gather(share.astype(dtype), 'fsdp', axis=axis, tiled=True)

  def scatter(_, grad):
    in_one = functools.partial(reduce_scatter, axis=axis, shape=share.shape)
    in_two = functools.partial(in_one, groups=reduce_scatter_groups())
    total = jax.lax.platform_dependent(
      grad.astype(grad_dtype), cpu=all_reduce, tpu=in_two, default=in_one
    )
    return total.astype(share.dtype)

  def all_reduce(
    grad,
  ):  # Between processes on CPUs a reduce-scatter (gloo's) now and then adds wrong.
    side = share.shape[axis]
    return jax.lax.dynamic_slice_in_dim(
      jax.lax.psum(grad, 'fsdp'), jax.lax.axis_index('fsdp') * side, side, axis
    )

  return jax.custom_derivatives.linear_call(collect, scatter, (), share)


def reduce_scatter(
  grad: jax.Array, *, axis: int, shape: tuple[int, ...], groups: tuple = (None,)
) -> jax.Array:
  """The sum over 'fsdp' of every device's `grad`, of which each keeps its share of that shape, cut along `axis`; in as many
  steps as there are `groups` of devices.

  A TPU's compiler sums all for everybody, twice the bytes, where shares would cut tiles of 128: they are then put one after
  another first.
  """
  if shape[axis] % 128 == 0:
    grad = grad if axis else grad.reshape(grad.shape[0], -1)
  else:
    grad = jnp.moveaxis(grad.reshape(*shape[:axis], -1, *shape[axis:]), axis, 0)
    axis = 0
  for among in groups:
    grad = jax.lax.psum_scatter(
      grad, 'fsdp', scatter_dimension=axis, axis_index_groups=among, tiled=True
    )
  return grad.reshape(shape)


def reduce_scatter_groups() -> tuple:
  """Among which devices of 'fsdp' to sum, and then among which. (None,): among all at once.

  Of a whole slice of eight or more at once a TPU's compiler, again, makes a sum for everybody.
  """
  count = jax.lax.axis_size('fsdp')
  if count < 8 or jax.lax.axis_size('data') > 1:
    return (None,)
  inner = max(i for i in range(1, math.isqrt(count) + 1) if count % i == 0)
  places = np.arange(count).reshape(-1, inner)
  return places.T.tolist(), places.tolist()


def shard_map_gradient(gradient: Callable, mesh: Mesh, specs, grad_dtype: str) -> Callable:
  """`gradient(params, arrays, key) -> (value, grads)`, done by every device for its own rows, as one sum over all devices.

  There `params` are the device's shares, which `all_gather_params` makes whole, and draws with `key` for rows are those rows of the draws
  that one device would make for all. XLA would choose by itself what to gather; so written it gathers parameters and sums
  gradients, once, in `grad_dtype`, and no activation leaves its device.
  """
  axes = ('data', 'fsdp')

  def local(params, arrays, key):
    value, grads = gradient(params, arrays, fold_in_device(key, jax.lax.axis_index(axes)))
    split = jax.tree.map(lambda spec: 'fsdp' in spec, specs)
    everything = jax.tree.map(
      lambda grad, split: None if split else grad.astype(grad_dtype), grads, split
    )
    shares = jax.tree.map(
      lambda grad, split: grad.astype(grad_dtype) if split else None, grads, split
    )
    everything = jax.lax.psum(everything, axes)
    shares = jax.lax.psum(shares, 'data') if mesh.shape['data'] > 1 else shares
    total = lambda grad, split, one, other: (other if split else one).astype(grad.dtype)
    return jax.lax.psum(value, axes), jax.tree.map(total, grads, split, everything, shares)

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, PartitionSpec(axes), PartitionSpec()),
    out_specs=(PartitionSpec(), specs),
    check_vma=False,
  )
  return lambda params, arrays, key: spread(params, arrays, jax.random.key_data(key))


def shard_map_sums(function: Callable, mesh: Mesh, specs) -> Callable:
  """`function(params, batch) -> sums`, done by every device for its own rows, from its shares of `params`, and added up."""
  axes = ('data', 'fsdp')
  local = lambda params, batch: jax.lax.psum(function(params, batch), axes)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, PartitionSpec(axes)),
    out_specs=PartitionSpec(),
    check_vma=False,
  )


def shard_map_rows(function: Callable, mesh: Mesh, specs) -> Callable:
  """`function(params, batch) -> rows`, done by every device for its own rows, from its shares of `params`: the rows of all."""
  axes = PartitionSpec(('data', 'fsdp'))
  return jax.shard_map(function, mesh=mesh, in_specs=(specs, axes), out_specs=axes, check_vma=False)


MIN_SHARDED_SIZE = (
  2**16
)  # Elements: an array with fewer is cheaper to keep everywhere than to gather.


def state_shardings(shapes, mesh: Mesh):
  """A tree like `shapes` with the sharding of every leaf: over 'fsdp' along its largest axis that divides.

  The leading axis of stacked blocks is never split: a block's parameters are gathered when its turn comes, and then dropped.
  """

  def sharding(keys, leaf) -> NamedSharding:
    stacked = any(getattr(key, 'key', None) == 'encoderblock' for key in keys)
    axes = [
      i
      for i, side in enumerate(leaf.shape)
      if side % mesh.shape['fsdp'] == 0 and not (stacked and i == 0)
    ]
    if mesh.shape['fsdp'] == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
      return replicated(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

  return jax.tree.map_with_path(sharding, shapes)


def state_specs(shapes, mesh: Mesh):
  """A tree like `shapes`: the axis of each leaf that is over 'fsdp', as a PartitionSpec."""
  return jax.tree.map(lambda sharding: sharding.spec, state_shardings(shapes, mesh))


def unsharded_params(shapes, mesh: Mesh) -> list[str]:
  """A line for each array that is large and yet whole on every device, since no side of it divides by fsdp."""
  fsdp = mesh.shape['fsdp']
  name = lambda keys: '/'.join(str(getattr(key, 'key', key)) for key in keys)
  return [
    f'{name(keys)} {list(leaf.shape)} is whole on every device: none of its sides divides by config.mesh.fsdp={fsdp}'
    for keys, leaf in jax.tree.leaves_with_path(shapes)
    if fsdp > 1 and leaf.size >= MIN_SHARDED_SIZE and 'fsdp' not in leaf.sharding.spec
  ]
