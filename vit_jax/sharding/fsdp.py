"""Fully sharded data parallelism: the layout of the parameters and the collectives for them.

With a mesh, each device computes the gradient of its rows under `shard_map`. Parameters are
gathered just before they are used and gradients are summed once, so no activation leaves its
device. XLA's partitioner would make its own choice of what to gather.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.sharding.mesh import batch_sharding, replicated
from vit_jax.sharding.prng import fold_in_device

# Number of elements below which replicating an array is cheaper than gathering it.
MIN_SHARDED_SIZE = 2**16
_AXES = ('data', 'fsdp')


def state_shardings(shapes, mesh: Mesh):
  """Return a tree like `shapes` with the sharding of each leaf.

  A leaf is split over 'fsdp' along its largest axis that divides. The leading axis of stacked
  blocks is never split, because the parameters of one block are gathered when the block runs, and
  then dropped.
  """
  fsdp = mesh.shape['fsdp']

  def leaf_sharding(path, leaf) -> NamedSharding:
    stacked = any(getattr(key, 'key', None) == 'encoderblock' for key in path)
    axes = [i for i, side in enumerate(leaf.shape) if side % fsdp == 0 and not (stacked and i == 0)]
    if fsdp == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
      return replicated(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

  return jax.tree.map_with_path(leaf_sharding, shapes)


def state_specs(shapes, mesh: Mesh):
  """Return a tree like `shapes` with the `PartitionSpec` of each leaf, as in `state_shardings`."""
  return jax.tree.map(lambda sharding: sharding.spec, state_shardings(shapes, mesh))


def unsharded_params(shapes, mesh: Mesh) -> list[str]:
  """Return a message for each large array that fsdp cannot split evenly."""
  fsdp = mesh.shape['fsdp']
  return [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} {list(leaf.shape)} is replicated '
    f'on every device: config.mesh.fsdp={fsdp} divides none of its sides'
    for path, leaf in jax.tree.leaves_with_path(shapes)
    if fsdp > 1 and leaf.size >= MIN_SHARDED_SIZE and 'fsdp' not in leaf.sharding.spec
  ]


def split_params(params: dict, is_trained: dict | None) -> tuple[dict, dict]:
  """Return the trained and the frozen parameters, each a tree like `params` with None elsewhere.

  All are trained if `is_trained`, a tree of bools, is None.
  """
  if is_trained is None:
    is_trained = jax.tree.map(lambda _: True, params)
  trained = jax.tree.map(lambda x, keep: x if keep else None, params, is_trained)
  frozen = jax.tree.map(lambda x, keep: None if keep else x, params, is_trained)
  return trained, frozen


def join_params(trained: dict, frozen: dict) -> dict:
  """Return the inverse of `split_params`."""
  is_none = lambda x: x is None
  return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=is_none)


def compute_gradient(
  loss_fn: Callable,
  trained: dict,
  frozen: dict,
  arrays: tuple[jax.Array, ...],
  key: jax.Array,
  *,
  model: nn.Module,
  grad_accum_steps: int,
) -> tuple[jax.Array, dict]:
  """Return (loss, gradient for the trained parameters) of a batch, without collectives.

  `loss_fn(params, *arrays, key, model=model)` is a sum over the rows of `arrays`, each [b, ...] or
  a tuple of such.
  """

  def loss(trained, *arrays_and_key):
    return loss_fn(join_params(trained, frozen), *arrays_and_key, model=model)

  return sum_over_microbatches(jax.value_and_grad(loss), grad_accum_steps, trained, arrays, key)


def compute_fsdp_gradient(
  loss_fn: Callable,
  trained: dict,
  frozen: dict,
  arrays: tuple[jax.Array, ...],
  key: jax.Array,
  *,
  model: nn.Module,
  grad_accum_steps: int,
  mesh: Mesh,
  grad_dtype: str,
) -> tuple[jax.Array, dict]:
  """Return what `compute_gradient` does, with rows and parameters split over the mesh.

  Rows are split over all devices, parameters over 'fsdp'. Each device computes the gradient of
  its rows; the gradients are summed once, in `grad_dtype`. Random draws for the rows of a device
  equal those rows of the draws that one device would make for all rows.
  """
  specs, frozen_specs = (state_specs(params, mesh) for params in (trained, frozen))
  model, gather = with_block_gather(model, join_params(specs, frozen_specs), grad_dtype)

  def local_gradient(shards, frozen_shards, arrays, key_data):
    def sharded_loss(shards, *arrays_and_key):
      return loss_fn(gather(join_params(shards, frozen_shards)), *arrays_and_key, model=model)

    key = fold_in_device(key_data, jax.lax.axis_index(_AXES))
    value_and_grad = jax.value_and_grad(sharded_loss)
    value, grads = sum_over_microbatches(value_and_grad, grad_accum_steps, shards, arrays, key)
    return jax.lax.psum(value, _AXES), _sum_gradients(grads, specs, mesh, grad_dtype)

  return jax.shard_map(
    local_gradient,
    mesh=mesh,
    in_specs=(specs, frozen_specs, batch_sharding(mesh).spec, PartitionSpec()),
    out_specs=(PartitionSpec(), specs),
    check_vma=False,
  )(trained, frozen, arrays, jax.random.key_data(key))


def sum_over_microbatches(
  function: Callable, count: int, params: dict, arrays: tuple[jax.Array, ...], key: jax.Array
):
  """Sum `function(params, *arrays, key)` over `count` slices of the rows, to save memory.

  Slice i takes rows i, i + count, i + 2 count and so on. On each device these are among its own
  rows, so no row moves between devices.
  """
  if count == 1:
    return function(params, *arrays, key)
  split = lambda x: x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
  slices = [jax.tree.map(split, x) for x in arrays]

  def add(total, index_and_slice):
    i, arrays = index_and_slice
    result = function(params, *arrays, jax.random.fold_in(key, i))
    return jax.tree.map(jnp.add, total, result), None

  first = jax.tree.map(lambda x: x[0], slices)
  shapes = jax.eval_shape(function, params, *first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, (jnp.arange(count), slices))[0]


def _sum_gradients(grads: dict, specs: dict, mesh: Mesh, grad_dtype: str) -> dict:
  """Sum gradients over all devices in `grad_dtype`.

  Gradients of sharded parameters are summed over 'data' only: the transpose of `all_gather_params`
  has summed them over 'fsdp'. The others are summed over all devices in one collective.
  """
  is_sharded = jax.tree.map(lambda spec: 'fsdp' in spec, specs)

  def select(sharded: bool):
    return jax.tree.map(
      lambda grad, leaf: grad.astype(grad_dtype) if leaf == sharded else None, grads, is_sharded
    )

  replicated_sum = jax.lax.psum(select(False), _AXES)
  sharded_sum = jax.lax.psum(select(True), 'data') if mesh.shape['data'] > 1 else select(True)
  return jax.tree.map(
    lambda grad, leaf, one, other: (other if leaf else one).astype(grad.dtype),
    *(grads, is_sharded, replicated_sum, sharded_sum),
  )


def with_block_gather(
  model: nn.Module, specs: dict, grad_dtype: str = 'float32'
) -> tuple[nn.Module, Callable[[dict], dict]]:
  """Return (model, gather) for a device that holds shards of the parameters, laid out as `specs`.

  `gather(shards)` all-gathers all parameters except those of the stacked blocks. The model gathers
  each block when it runs, so that a device holds the full parameters of one block at a time.
  """
  blocks = specs['Transformer']['encoderblock'] if 'Transformer' in specs else {}
  if not any('fsdp' in spec for spec in jax.tree.leaves(blocks)):
    return model, functools.partial(all_gather_params, specs=specs, grad_dtype=grad_dtype)
  unsplit = jax.tree.map(lambda _: PartitionSpec(), blocks)
  rest = specs | {'Transformer': specs['Transformer'] | {'encoderblock': unsplit}}
  # One block has no depth axis, which is never split.
  block_specs = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), blocks)
  dtype = model.config.dtype

  def gather_block(block: dict) -> dict:
    shards = block['params']
    return {'params': all_gather_params(shards, block_specs, cast=dtype, grad_dtype=grad_dtype)}

  gather = functools.partial(all_gather_params, specs=rest, grad_dtype=grad_dtype)
  return model.clone(gather=gather_block), gather


def all_gather_params(shards, specs, *, cast: str | None = None, grad_dtype: str = 'float32'):
  """All-gather the arrays that `specs` split over 'fsdp', as dtype `cast` (default: their own).

  The transpose sums the gradient over 'fsdp' in `grad_dtype`, and leaves each device its shard of
  the sum.
  """

  def gather(shard, spec):
    if 'fsdp' not in spec:
      return shard
    return all_gather_array(shard, spec.index('fsdp'), cast or shard.dtype, grad_dtype)

  return jax.tree.map(gather, shards, specs)


def all_gather_array(shard: jax.Array, axis: int, dtype, grad_dtype) -> jax.Array:
  """All-gather an array over 'fsdp' along `axis`, as `dtype`.

  The transpose sums in `grad_dtype`.
  """

  def forward(_, shard):
    return jax.lax.all_gather(shard.astype(dtype), 'fsdp', axis=axis, tiled=True)

  def transpose(_, grad):
    one_step = functools.partial(reduce_scatter, axis=axis, shape=shard.shape)
    two_steps = functools.partial(one_step, groups=reduce_scatter_groups())
    total = jax.lax.platform_dependent(
      grad.astype(grad_dtype), cpu=all_reduce, tpu=two_steps, default=one_step
    )
    return total.astype(shard.dtype)

  # On CPUs, gloo's reduce-scatter between processes occasionally returns wrong sums.
  def all_reduce(grad):
    side = shard.shape[axis]
    total = jax.lax.psum(grad, 'fsdp')
    return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index('fsdp') * side, side, axis)

  return jax.custom_derivatives.linear_call(forward, transpose, (), shard)


def reduce_scatter(
  grad: jax.Array, *, axis: int, shape: tuple[int, ...], groups: tuple = (None,)
) -> jax.Array:
  """Sum `grad` over 'fsdp' and return this device's shard of the sum.

  The shard has `shape`; `axis` is split. The sum takes one step for each entry of `groups`, as
  `reduce_scatter_groups` returns them.

  If the shards cut through tiles of 128, the TPU compiler emits an all-reduce, which moves twice
  the bytes. The shards are therefore made contiguous first.
  """
  if shape[axis] % 128 == 0:
    grad = grad if axis else grad.reshape(grad.shape[0], -1)
  else:
    grad = jnp.moveaxis(grad.reshape(*shape[:axis], -1, *shape[axis:]), axis, 0)
    axis = 0
  for axis_index_groups in groups:
    grad = jax.lax.psum_scatter(
      grad, 'fsdp', scatter_dimension=axis, axis_index_groups=axis_index_groups, tiled=True
    )
  return grad.reshape(shape)


def reduce_scatter_groups() -> tuple:
  """Return the groups of 'fsdp' devices for each step of a reduce-scatter.

  (None,) is one step over all devices. The TPU compiler also emits an all-reduce when a
  reduce-scatter covers a slice of 8 or more devices entirely. Two steps over groups avoid that.
  """
  count = jax.lax.axis_size('fsdp')
  if count < 8 or jax.lax.axis_size('data') > 1:
    return (None,)
  inner = max(i for i in range(1, math.isqrt(count) + 1) if count % i == 0)
  devices = np.arange(count).reshape(-1, inner)
  return devices.T.tolist(), devices.tolist()


def shard_map_rows(function: Callable, mesh: Mesh, specs) -> Callable:
  """Return a function that concatenates `function(param_shards, local_batch)` of all devices."""
  rows = batch_sharding(mesh).spec
  return jax.shard_map(function, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False)
