"""Devices, and which part of an array lies on which of them. No other file says "device".

The mesh has the axes ('data', 'fsdp'). Batches are split over both; parameters, optimizer state and averages over 'fsdp'.
"""

import functools
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

# Dense bfloat16 FLOP/s of a device, by what `jax.Device.device_kind` says; the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU7x': 1153.5e12,  # Two devices a chip.
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}

# Fast memory that one fused operation may take, in KiB: more than the compiler's own 16 MiB lets products of matrices keep
# their operands there. On v5e four layers of L/16 take 7 % fewer cycles with 32 MiB than with 16, and 1 % fewer than with 64;
# v6e's and TPU7x's as others found them.
SCOPED_VMEM_KIB = {'TPU v5 lite': 32768, 'TPU v6 lite': 98304, 'TPU7x': 65536}


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """What the compiler is told beyond its defaults for these devices."""
  limit, name = (
    SCOPED_VMEM_KIB.get(mesh.devices.flat[0].device_kind),
    'xla_tpu_scoped_vmem_limit_kib',
  )
  said = name in os.environ.get('LIBTPU_INIT_ARGS', '')  # By the person, who knows better.
  return {name: str(limit)} if limit and not said else {}


def make_mesh(fsdp: int, *, batches: dict[str, int], devices: list | None = None) -> Mesh:
  """All devices of all hosts (or `devices`), as ('data', 'fsdp'). Between slices, where the network is slow, runs 'data' alone.

  UserError where they don't divide, or don't divide a batch size, or one copy of the parameters would need several slices.
  """
  devices = jax.devices() if devices is None else devices
  count, slices = len(devices), len({getattr(device, 'slice_index', 0) for device in devices})
  check_mesh_divides(fsdp, batches=batches, devices=count, slices=slices)
  axes, types = ('data', 'fsdp'), (AxisType.Auto, AxisType.Auto)
  inside = (count // slices // fsdp, fsdp)
  # Allowed to split an axis of the torus: 16 of the 8 x 8 x 8 chips are no product of whole ones.
  lay_out = functools.partial(mesh_utils.create_device_mesh, devices=devices)
  if slices > 1:
    lay_out = functools.partial(
      mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=(slices, 1), devices=devices
    )
  return Mesh(lay_out(inside, allow_split_physical_axes=True), axes, axis_types=types)


def check_mesh_divides(
  fsdp: int, *, batches: dict[str, int], devices: int, slices: int = 1, hosts: int = 0
):
  """UserError where `make_mesh` has one for so many devices, which need not be here; `hosts` are for its words."""
  where = f'{devices} devices' + (f' of {hosts} hosts' if hosts else '')
  if devices % fsdp:
    raise UserError(
      f'config.mesh.fsdp={fsdp} does not divide the {where}: choose a number that does, such as 1'
    )
  if devices // slices % fsdp:
    raise UserError(
      f'config.mesh.fsdp={fsdp} does not divide the {devices // slices} devices of a slice: between the {slices} slices the '
      'network is too slow to gather parameters over'
    )
  for name, batch in batches.items():
    if batch % devices:
      raise UserError(
        f'{name}={batch} does not divide over {where}: the nearest that do are {format_nearest_multiples(batch, devices)}'
      )


def format_nearest_multiples(batch: int, count: int) -> str:
  """The multiples of `count` around `batch`, in words."""
  low = batch // count * count
  return f'{low} and {low + count}' if low else str(count)


def describe_mesh(mesh: Mesh) -> str:
  """'8 x TPU v4 (data 4, fsdp 2)'."""
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})'


def compilation_target() -> tuple[str, str]:
  """(platform, kind of device) that the program in the making is for: of the mesh in force, which need not be here, or ours."""
  mesh = jax.sharding.get_abstract_mesh()
  device = jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device
  return device.platform, device.device_kind


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis over all devices: a batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def peak_flops(mesh: Mesh) -> float | None:
  """FLOP/s of all devices together in bfloat16, or None where the chip is not in the table."""
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  return peak * mesh.size if peak else None


def shard_from_host(arrays, shardings):
  """Arrays of this host -> the same laid out as `shardings`: a device is given its share, and never the whole."""
  share = lambda array, sharding: jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )
  return jax.tree.map(
    lambda x, sharding: x if isinstance(x, jax.Array) else share(x, sharding), arrays, shardings
  )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows of a batch -> the whole batch, split over all devices. Returns before the copy is done."""
  return {
    name: jax.make_array_from_process_local_data(batch_sharding(mesh), array)
    for name, array in batch.items()
  }


def make_any_host(mesh: Mesh) -> Callable[[bool], jax.Array] | None:
  """What a host says -> whether any of them says yes, on its way when this returns. None where there is one host."""
  if jax.process_count() == 1:
    return None
  yes = jax.jit(jax.numpy.any, out_shardings=replicated(mesh))
  return lambda said: yes(to_global({'said': np.full(len(mesh.local_devices), said)}, mesh)['said'])
