"""Devices and shardings, on eight simulated devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.mesh import describe_mesh, make_mesh, peak_flops, state_shardings, to_global


def test_data_takes_what_fsdp_leaves():
  assert dict(make_mesh(2, batches={}).shape) == {'data': 4, 'fsdp': 2}


def test_a_batch_that_does_not_divide_is_refused_with_its_neighbours():
  with pytest.raises(UserError, match=r'config.data.batch=100 does not divide over 8 .*96 and 104'):
    make_mesh(1, batches={'config.data.batch': 100})


def test_fsdp_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match='fsdp=3 does not divide the 8'):
    make_mesh(3, batches={})


def test_parameters_are_split_along_their_largest_side_but_never_along_the_depth():
  mesh = make_mesh(8, batches={})
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)
  tree = {
    'head': {'kernel': shape(512, 1024), 'bias': shape(1024)},
    'encoderblock': {'kernel': shape(4096, 64, 128)},
    'odd': shape(333, 999),
  }
  specs = jax.tree.map(lambda s: s.spec, state_shardings(tree, mesh))
  assert specs == {
    'head': {'kernel': P(None, 'fsdp'), 'bias': P()},  # The bias is too small to be worth gathering.
    'encoderblock': {'kernel': P(None, None, 'fsdp')},
    'odd': P(),
  }


def test_a_global_batch_is_the_rows_in_order_over_all_devices():
  mesh = make_mesh(2, batches={})
  rows = np.arange(16 * 3).reshape(16, 3)
  batch = to_global({'image': rows}, mesh)['image']
  np.testing.assert_array_equal(np.asarray(batch), rows)
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_a_chip_that_is_not_in_the_table_has_no_known_peak():
  mesh = make_mesh(1, batches={})
  assert peak_flops(mesh) is None
  assert describe_mesh(mesh) == '8 x cpu (data 8, fsdp 1)'
