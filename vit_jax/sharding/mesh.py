"""The device mesh, and which part of an array lies on which device.

The mesh has the axes ('data', 'fsdp'). Batches are split over both; parameters, optimizer state and
moving averages over 'fsdp'.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

# Dense bfloat16 FLOP/s of a device, by `jax.Device.device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU7x': 1153.5e12,  # Each chip has two devices.
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}

# Those of `jax.Device.memory_stats` that a run records.
MEMORY_STATS = ('bytes_in_use', 'peak_bytes_in_use')

# VMEM that one fusion may use, in KiB. With more than the compiler's default of 16 MiB, matrix
# products keep their operands there. On v5e, four layers of L/16 take 7 % fewer cycles with 32 MiB
# than with 16, and 1 % fewer than with 64. The values of v6e and TPU7x are published ones.
SCOPED_VMEM_KIB = {'TPU v5 lite': 32768, 'TPU v6 lite': 98304, 'TPU7x': 65536}


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
  """Return the compiler options for these devices; LIBTPU_INIT_ARGS takes precedence."""
  name = 'xla_tpu_scoped_vmem_limit_kib'
  limit = SCOPED_VMEM_KIB.get(mesh.devices.flat[0].device_kind)
  set_by_user = name in os.environ.get('LIBTPU_INIT_ARGS', '')
  return {name: str(limit)} if limit and not set_by_user else {}


def count_devices() -> int:
  """Return the number of devices of all hosts."""
  return jax.device_count()


def make_mesh(fsdp: int, *, batches: dict[str, int], devices: list | None = None) -> Mesh:
  """Return a mesh ('data', 'fsdp') of `devices`, by default all devices of all hosts.

  Only 'data' runs between slices, where the network is slow.

  Args:
    fsdp: Number of devices that share one copy of the parameters.
    batches: {name of a setting: batch size} of the batches that are split over the mesh.
    devices: The devices to use.

  Raises UserError if `fsdp` does not divide the devices of a slice, or the devices do not divide a
  batch size.
  """
  devices = jax.devices() if devices is None else devices
  count, slices = len(devices), len({getattr(device, 'slice_index', 0) for device in devices})
  check_mesh_divides(fsdp, batches=batches, devices=count, slices=slices)
  axes, types = ('data', 'fsdp'), (AxisType.Auto, AxisType.Auto)
  inside = (count // slices // fsdp, fsdp)
  # A group may split an axis of the torus: 16 of 8 x 8 x 8 chips are no product of full axes.
  lay_out = functools.partial(mesh_utils.create_device_mesh, devices=devices)
  if slices > 1:
    lay_out = functools.partial(
      mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=(slices, 1), devices=devices
    )
  return Mesh(lay_out(inside, allow_split_physical_axes=True), axes, axis_types=types)


def check_mesh_divides(
  fsdp: int, *, batches: dict[str, int], devices: int, slices: int = 1, hosts: int = 0
):
  """Raise the UserError of `make_mesh` for a number of devices, which need not be present.

  `hosts` is only used in the message.
  """
  where = f'{devices} devices' + (f' of {hosts} hosts' if hosts else '')
  if devices % fsdp:
    raise UserError(
      f'config.mesh.fsdp={fsdp} does not divide the {where}; choose a divisor, such as 1'
    )
  if devices // slices % fsdp:
    raise UserError(
      f'config.mesh.fsdp={fsdp} does not divide the {devices // slices} devices of a slice; the '
      f'network between the {slices} slices is too slow for gathering parameters'
    )
  for name, batch in batches.items():
    if batch % devices:
      raise UserError(
        f'{name}={batch} is not divisible by {where}; '
        f'use {format_nearest_multiples(batch, devices)}'
      )


def format_nearest_multiples(batch: int, count: int) -> str:
  """Return the multiples of `count` around `batch`, such as '96 or 104'."""
  low = batch // count * count
  return f'{low} or {low + count}' if low else str(count)


def describe_mesh(mesh: Mesh) -> str:
  """Return a summary such as '8 x TPU v4 (data 4, fsdp 2)'."""
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})'


def describe_devices() -> str:
  """Return the number and kind of all devices, such as '8 x TPU v4'."""
  return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


def first_device() -> list[jax.Device]:
  """Return a list of one device, for a program that does not depend on their number."""
  return jax.devices()[:1]


def compilation_target() -> tuple[str, str]:
  """Return (platform, device kind) of the devices that the current program is compiled for.

  These are the devices of the mesh in force, which need not be present, or the local ones.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device
  return device.platform, device.device_kind


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a batch: its first axis is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding with a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def peak_flops(mesh: Mesh) -> float | None:
  """Return the bfloat16 FLOP/s of all devices together; None if `PEAK_FLOPS` lacks the chip."""
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  return peak * mesh.size if peak else None


def split_matrices(x: jax.Array) -> jax.Array:
  """Lay matrices [depth, m, n] out so that the devices of the current mesh share the work on them.

  Each device has some of the matrices if the number of devices, or of those of an axis of the mesh,
  divides the depth. Products of them then need no communication. Otherwise the devices of 'fsdp'
  share the columns, if their number divides them. Without a mesh, `x` stays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  for dimension, axes in ((0, ('data', 'fsdp')), (0, ('fsdp',)), (0, ('data',)), (2, ('fsdp',))):
    count = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    if count > 1 and x.shape[dimension] % count == 0:
      return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * dimension, axes))
  return x


def shard_from_host(arrays, shardings):
  """Copy arrays of the host to the devices; each device receives only its shard.

  Leaves that are `jax.Array` are returned unchanged.
  """

  def shard(array, sharding) -> jax.Array:
    if isinstance(array, jax.Array):
      return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(shard, arrays, shardings)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Return the global batch, split over all devices, from this host's rows of it.

  Returns before the copy is complete.
  """
  return {
    name: jax.make_array_from_process_local_data(batch_sharding(mesh), array)
    for name, array in batch.items()
  }


def make_largest(mesh: Mesh) -> Callable[[int], jax.Array] | None:
  """Return a function that maps a number of each host to the largest of them, a lazy int32.

  Every host has to call the function equally often. Returns None if there is only one host.
  """
  if jax.process_count() == 1:
    return None
  largest_of_all = jax.jit(jax.numpy.max, out_shardings=replicated(mesh))

  def largest(number: int) -> jax.Array:
    numbers = np.full(len(mesh.local_devices), number, np.int32)
    return largest_of_all(to_global({'number': numbers}, mesh)['number'])

  return largest


def device_memory(mesh: Mesh) -> dict[str, int]:
  """Return the bytes in use, and their peak, of the device of this host that uses the most.

  Returns an empty dict for devices that do not count them, such as CPUs.
  """
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  counted = [name for name in MEMORY_STATS if all(name in each for each in stats)]
  return {f'device_{name}': max(each[name] for each in stats) for name in counted}
