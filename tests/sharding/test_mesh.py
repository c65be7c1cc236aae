"""Meshes, layouts and reduce-scatter, on eight simulated devices."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.sharding.fsdp import (
  reduce_scatter,
  reduce_scatter_groups,
  state_shardings,
  unsharded_params,
)
from vit_jax.sharding.mesh import describe_mesh, make_mesh, peak_flops, shard_from_host, to_global
from vit_jax.step import init_state


def test_the_data_axis_has_the_devices_that_fsdp_leaves():
  assert dict(make_mesh(2, batches={}).shape) == {'data': 4, 'fsdp': 2}


def test_an_indivisible_batch_is_an_error_with_the_nearest_multiples():
  with pytest.raises(UserError, match=r'config.data.batch=100 .*96 or 104'):
    make_mesh(1, batches={'config.data.batch': 100})


def test_fsdp_that_does_not_divide_the_devices_is_an_error():
  with pytest.raises(UserError, match='config.mesh.fsdp=3 '):
    make_mesh(3, batches={})


def test_parameters_are_split_along_their_largest_axis_but_never_along_the_depth():
  mesh = make_mesh(8, batches={})
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)
  tree = {
    'head': {'kernel': shape(512, 1024), 'bias': shape(1024)},
    'encoderblock': {'kernel': shape(4096, 64, 128)},
    'odd': shape(333, 999),
  }
  specs = jax.tree.map(lambda s: s.spec, state_shardings(tree, mesh))
  assert specs == {
    'head': {
      'kernel': P(None, 'fsdp'),
      'bias': P(),  # Below MIN_SHARDED_SIZE.
    },
    'encoderblock': {'kernel': P(None, None, 'fsdp')},
    'odd': P(),
  }


def test_a_global_batch_has_the_rows_in_order_over_all_devices():
  mesh = make_mesh(2, batches={})
  rows = np.arange(16 * 3).reshape(16, 3)
  batch = to_global({'image': rows}, mesh)['image']
  np.testing.assert_array_equal(np.asarray(batch), rows)
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_a_chip_outside_the_table_has_no_known_peak_flops():
  mesh = make_mesh(1, batches={})
  assert peak_flops(mesh) is None
  assert describe_mesh(mesh) == '8 x cpu (data 8, fsdp 1)'


@dataclasses.dataclass(frozen=True, order=True)
class Chip:
  """A stand-in for `jax.Device` with the attributes that `make_mesh` reads."""

  slice_index: int
  id: int
  process_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'cpu'


@pytest.mark.parametrize('fsdp', [1, 2, 4])
def test_devices_that_share_parameters_are_in_one_slice(fsdp):
  chips = [Chip(slice_index=i % 2, id=i) for i in range(8)]
  mesh = make_mesh(fsdp, batches={}, devices=chips)
  assert dict(mesh.shape) == {'data': 8 // fsdp, 'fsdp': fsdp}
  assert [chip.slice_index for chip in mesh.devices.flat] == [0, 0, 0, 0, 1, 1, 1, 1]
  assert {chip.id for chip in mesh.devices.flat} == set(range(8))


def test_sharding_parameters_over_several_slices_is_an_error():
  with pytest.raises(UserError, match='config.mesh.fsdp=8 .*4 devices of a slice'):
    make_mesh(8, batches={}, devices=[Chip(slice_index=i % 2, id=i) for i in range(8)])


def test_a_large_array_that_cannot_be_split_evenly_is_named():
  mesh = make_mesh(8, batches={})
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)
  tree = {'head': {'kernel': shape(333, 999), 'bias': shape(999)}, 'other': shape(512, 1024)}
  laid_out = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  tree = jax.tree.map(laid_out, tree, state_shardings(tree, mesh))
  [message] = unsharded_params(tree, mesh)
  assert message.startswith('head/kernel [333, 999] ') and 'config.mesh.fsdp=8' in message
  assert unsharded_params(tree, make_mesh(1, batches={})) == []


def test_each_device_receives_its_shard_of_a_host_array():
  mesh = make_mesh(8, batches={})
  array = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
  out = shard_from_host({'kernel': array}, state_shardings({'kernel': array}, mesh))['kernel']
  assert {shard.data.shape for shard in out.addressable_shards} == {(512, 128)}
  np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize('shape', [(1024, 2, 3), (3, 1024), (40, 6), (2, 40, 3)], ids=str)
@pytest.mark.parametrize('fsdp', [4, 8])
def test_reduce_scatter_leaves_each_device_its_shard_of_the_sum(fsdp, shape):
  """Shards with and without full tiles of 128, along the first and other axes.

  Four devices sum in one step, eight in two steps.
  """
  mesh, axis = make_mesh(fsdp, batches={}), shape.index(max(shape))
  grads = np.random.default_rng(0).integers(0, 100, (8, *shape)).astype(np.float32)
  shard = tuple(side // fsdp if i == axis else side for i, side in enumerate(shape))

  def scattered(grad):
    return reduce_scatter(grad[0], axis=axis, shape=shard, groups=reduce_scatter_groups())[None]

  rows = P(('data', 'fsdp'))
  found = np.asarray(
    jax.shard_map(scattered, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(grads)
  )
  sums = grads.reshape(-1, fsdp, *shape).sum(axis=1)  # Over the devices of each 'fsdp' group.
  expected = [cut for total in sums for cut in np.split(total, fsdp, axis=axis)]
  np.testing.assert_array_equal(found, expected)


def test_initialization_never_holds_all_of_the_state_on_one_device():
  model = build_vit(ModelConfig(variant='mu/4', width=512, mlp=2048, heads=4, depth=4), 10)
  tx = optax.adam(1e-3)
  begin = functools.partial(init_state, 0, model=model, tx=tx, size=(8, 8), ema=True)
  shapes, mesh = jax.eval_shape(begin), make_mesh(8, batches={})
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  used = (
    jax.jit(begin, out_shardings=state_shardings(shapes, mesh)).lower().compile().memory_analysis()
  )
  assert used.output_size_in_bytes < total / 7  # An eighth, and the replicated arrays.
  assert used.output_size_in_bytes + used.temp_size_in_bytes < total / 4
