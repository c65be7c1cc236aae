"""Devices, and which part of an array lies on which of them. No other file says "device".

The mesh has the axes ('data', 'fsdp'). Batches are split over both; parameters, optimizer state and averages over 'fsdp'.
"""

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

SMALL = 2**16  # Elements: an array with fewer is cheaper to keep everywhere than to gather.

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


def make_mesh(fsdp: int, *, batches: dict[str, int], devices: list | None = None) -> Mesh:
  """All devices of all hosts (or `devices`), as ('data', 'fsdp').

  UserError where they don't divide, or don't divide a batch size.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if count % fsdp:
    raise UserError(f'config.mesh.fsdp={fsdp} does not divide the {count} devices')
  for name, batch in batches.items():
    if batch % count:
      raise UserError(f'{name}={batch} does not divide over {count} devices: the nearest that do are {nearest(batch, count)}')
  return jax.make_mesh((count // fsdp, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def distant_devices(name: str, slices: int = 1) -> list:
  """The devices of TPU slices that are not here, 'v5e:4x4', to compile for. Needs libtpu; UserError where it is not installed,
  or knows no such slice."""
  config = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
  config |= {'num_slices': slices} if slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **config).devices)
  except Exception as error:  # Of a plugin: it raises what it likes.
    why = ' '.join(str(error).split())[:200]
    raise UserError(f"{name}: not to be compiled for here: {why}. `pip install '.[plan]'` installs the compiler") from None


def nearest(batch: int, count: int) -> str:
  """The multiples of `count` around `batch`, in words."""
  low = batch // count * count
  return f'{low} and {low + count}' if low else str(count)


def describe_mesh(mesh: Mesh) -> str:
  """'8 x TPU v4 (data 4, fsdp 2)'."""
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})'


def rows(mesh: Mesh) -> NamedSharding:
  """The first axis over all devices: a batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def everywhere(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def peak_flops(mesh: Mesh) -> float | None:
  """FLOP/s of all devices together in bfloat16, or None where the chip is not in the table."""
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  return peak * mesh.size if peak else None


def state_shardings(shapes, mesh: Mesh):
  """A tree like `shapes` with the sharding of every leaf: over 'fsdp' along its largest axis that divides.

  The leading axis of stacked blocks is never split: a block's parameters are gathered when its turn comes, and then dropped.
  """

  def sharding(keys, leaf) -> NamedSharding:
    stacked = any(getattr(key, 'key', None) == 'encoderblock' for key in keys)
    axes = [i for i, side in enumerate(leaf.shape) if side % mesh.shape['fsdp'] == 0 and not (stacked and i == 0)]
    if mesh.shape['fsdp'] == 1 or not axes or np.prod(leaf.shape) < SMALL:
      return everywhere(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

  return jax.tree.map_with_path(sharding, shapes)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows of a batch -> the whole batch, split over all devices. Returns before the copy is done."""
  return {name: jax.make_array_from_process_local_data(rows(mesh), array) for name, array in batch.items()}
