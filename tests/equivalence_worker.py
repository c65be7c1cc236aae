"""One process of several that train together; test_equivalence.py starts it.

    python tests/equivalence_worker.py PORT PROCESSES PROCESS JOBS

JOBS is a JSON file: a list of {"workdir", "fsdp", "poisoned"}, trained in this order. The
observations of a process go to WORKDIR-PROCESS.json.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.data.loader import train_batches
from vit_jax.data.prefetch import host_kwargs, prefetch_to_device
from vit_jax.data.sources import open_source
from vit_jax.optim.losses import LOSSES, softmax_loss
from vit_jax.sharding.mesh import make_mesh
from vit_jax.train import train

# It uses every random draw, and is wide enough that some parameters are split over 'fsdp'. The
# optimizer is SGD: Adam's first step is the sign of the gradient, which amplifies rounding.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=128, size=(8, 8)),
  model=ModelConfig(variant='mu/4', depth=2, width=256, heads=4, dropout=0.1, drop_path=0.1),
  optim=OptimConfig(name='sgd', lr=1e-2, warmup='2', weight_decay=0.1, grad_clip_norm=1.0, ema=0.9),
  mixup=0.2,
  steps=20,
  log_every='1',
  eval_every='0',
  save_every='10',
)


def run(workdir: Path, fsdp: int) -> dict:
  """Train `CONFIG` in `workdir`.

  Return the last evaluation, the number of compilations of the step, and digests of the rows on
  this process's devices.
  """
  compilations = []
  note = lambda event, seconds, **kwargs: (
    compilations.append(kwargs.get('fun_name')) if 'backend_compile' in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(note)
  config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=fsdp))
  result = train(config, workdir)
  jax.monitoring.unregister_event_duration_listener(note)
  return {
    'result': result,
    'compilations': compilations.count('jit(train_step)'),
    'rows': digests(config),
  }


def digests(config: Config) -> dict[str, str]:
  """Return {'step/row': digest} of the rows of global batches on this process's devices."""
  config = validate(config)
  mesh, source = (
    make_mesh(config.mesh.fsdp, batches={}),
    open_source(config.data.train, config.data.split),
  )
  batches = prefetch_to_device(
    train_batches(source, config.data, seed=config.seed, start=0, **host_kwargs()), 2, mesh
  )
  found = {}
  for step, (_, batch) in zip(range(config.steps), batches, strict=False):
    for name, array in batch.items():
      for shard in array.addressable_shards:
        for row, value in enumerate(jax.device_get(shard.data), shard.index[0].start or 0):
          found.setdefault(f'{step}/{row}', hashlib.sha256()).update(
            name.encode() + value.tobytes()
          )
  return {key: digest.hexdigest() for key, digest in found.items()}


def poisoned(logits: jax.Array, targets: jax.Array, **options) -> jax.Array:
  """Return the loss, or NaN on a device whose rows all have a share of class 0.

  Of many devices, one has such rows in some steps.
  """
  return softmax_loss(logits, targets, **options) + jnp.where((targets[:, 0] > 0).all(), jnp.nan, 0)


def main(port: str, processes: str, process: str, jobs: str):
  jax.distributed.initialize(
    f'localhost:{port}', int(processes), int(process), initialization_timeout=120
  )
  for job in json.loads(Path(jobs).read_text(encoding='utf-8')):
    LOSSES['softmax'] = poisoned if job.get('poisoned') else softmax_loss
    seen = run(Path(job['workdir']), job['fsdp'])
    Path(f'{job["workdir"]}-{process}.json').write_text(json.dumps(seen), encoding='utf-8')


if __name__ == '__main__':
  main(*sys.argv[1:])
