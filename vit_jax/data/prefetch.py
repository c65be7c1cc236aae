"""Batches of the loader on their way to the devices."""

import itertools
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from vit_jax.sharding.mesh import Mesh, to_global


def host_kwargs() -> dict[str, int]:
  """Return which host this is and how many there are, as keyword arguments of the loader."""
  return {'host': jax.process_index(), 'hosts': jax.process_count()}


def prefetch_to_device(
  batches: Iterator[dict[str, np.ndarray]], size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
  """Yield (this host's example ids [b], the batch as global arrays), copied ahead of use.

  `size` copies are under way. The ids stay on the host: ~i is an example i that could not be read.
  """

  def send(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, jax.Array]]:
    arrays = {name: array for name, array in batch.items() if name != 'id'}
    return batch['id'], to_global(arrays, mesh)

  queue = deque(map(send, itertools.islice(batches, size)))
  while queue:
    yield queue.popleft()
    queue.extend(map(send, itertools.islice(batches, 1)))
