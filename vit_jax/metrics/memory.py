"""The memory that a run uses: that of its devices, and that of the processes on its hosts."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from vit_jax.sharding.mesh import Mesh, device_memory


def measure_memory(mesh: Mesh) -> dict[str, int]:
  """Return the bytes in use on the device and on the host that use the most. All hosts call it.

  device_bytes_in_use, device_peak_bytes_in_use   where the devices count them: GPUs and TPUs
  host_resident_bytes                             as `resident_bytes`, on Linux
  """
  values = device_memory(mesh)
  if (resident := resident_bytes()) is not None:
    values['host_resident_bytes'] = resident
  if jax.process_count() == 1 or not values:
    return values
  # JAX would drop the upper half of an int64.
  row = np.array(list(values.values()), np.int64).view(np.int32)
  rows = np.ascontiguousarray(process_allgather(row)).view(np.int64)
  return dict(zip(values, rows.max(axis=0).tolist(), strict=True))


def resident_bytes(proc: Path = Path('/proc')) -> int | None:
  """Return the resident memory of this process and the private one of its data workers.

  Returns None where the system has no /proc.
  """
  try:
    resident, _ = _resident_pages(proc / 'self')
    tasks = list((proc / 'self' / 'task').iterdir())
  except (OSError, ValueError):
    return None
  for task in tasks:
    try:
      children = (task / 'children').read_text(encoding='utf-8').split()
      pages = [_resident_pages(proc / child) for child in children]
    except (OSError, ValueError):  # A thread or a worker has ended.
      continue
    resident += sum(total - shared for total, shared in pages)
  return resident * os.sysconf('SC_PAGE_SIZE')


def _resident_pages(process: Path) -> tuple[int, int]:
  """Return the numbers of resident pages of a process and of those that it may share."""
  _, resident, shared, *_ = map(int, (process / 'statm').read_text(encoding='utf-8').split())
  return resident, shared
