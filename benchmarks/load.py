"""Measure time and memory from a released file to the first logits.

    python benchmarks/load.py [B_16.npz]     any file that `vit_jax.load` takes; by default a random
    B/16

Prints the seconds from the call of `load` to the logits of one image, and how much of that is
compilation. Prints the peak memory of the process (Python, JAX and all) relative to the size of the
file.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import vit_jax

load = vit_jax.load  # Imports what it needs, before the clock starts.


def released_b16(path: Path):
  """Write a random file like ViT-B_16-224.npz, with 1,000 classes.

  Zeros would compress to nothing.
  """
  import flax.traverse_util

  from vit_jax.config import ModelConfig
  from vit_jax.models.vit import build_vit
  from vit_jax.pretrained.npz import to_google
  from vit_jax.step import abstract_params

  rng = np.random.default_rng(0)
  shapes = flax.traverse_util.flatten_dict(
    abstract_params(build_vit(ModelConfig(variant='B/16'), 1000), (224, 224)), sep='/'
  )
  np.savez(
    path,
    **to_google(
      {name: 0.02 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
    ),
  )


def main():
  """Print one line."""
  if len(sys.argv) == 1:
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / 'ViT-B_16-224.npz'
      released_b16(path)
      subprocess.run(
        [sys.executable, __file__, str(path)], check=True
      )  # Its own process: its memory is its own.
    return
  compiling = []
  note = lambda event, seconds, **_: (
    compiling.append(seconds) if 'backend_compile' in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(note)
  began = time.perf_counter()
  model = load(sys.argv[1])
  loaded = time.perf_counter() - began
  jax.block_until_ready(model.logits(np.zeros((1, *model.size, 3), np.uint8)))
  total = time.perf_counter() - began
  size = Path(sys.argv[1]).stat().st_size
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(
    f'{model.config.variant}, {size / 2**20:.0f} MiB: read in {loaded:.2f} s, first logits after '
    f'{total:.2f} s, of which '
    f'{sum(compiling):.2f} s compiling; peak {peak / 2**20:.0f} MiB, {peak / size:.2f} of the file'
  )


if __name__ == '__main__':
  main()
