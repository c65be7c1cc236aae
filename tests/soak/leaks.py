"""Log the resources of a run that saves after every step, evaluates and has a worker process.

    python tests/soak/leaks.py WORKDIR STEPS

Every second it appends a line to WORKDIR/resources.jsonl: the newest checkpoint, resident memory,
file descriptors, threads, mappings of /dev/shm, children, live arrays and compiled programs of this
process. It also counts all files in /dev/shm, which other programs use too. test_leaks.py runs this
file and reads the lines.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig

EVALUATE_EVERY = 50  # Steps. Each evaluation starts a worker.


def leak_config(steps: int) -> Config:
  """Return a config of a small run with many features enabled."""
  return Config(
    data=DataConfig(
      train='builtin:digits',
      eval_split='test[:64]',
      batch=16,
      eval_batch=32,
      size=(8, 8),
      workers=1,
    ),
    model=ModelConfig(variant='mu/4', depth=2, dropout=0.1),
    optim=OptimConfig(lr=1e-3, grad_clip_norm=1.0, ema=0.9, skip_spikes=6.0),
    mixup=0.2,
    steps=steps,
    log_ids=True,
    log_every='5',
    eval_every=str(EVALUATE_EVERY),
    save_every='1',
    max_to_keep=2,
  )


def measure_resources(workdir: Path, compiled: list) -> dict[str, float]:
  """Return the resources that this process uses now. Memory is in MB."""
  import jax

  pages = int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[1])
  saved = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return {
    'time': time.monotonic(),
    'saved': max(saved, default=0),
    'rss': pages * os.sysconf('SC_PAGE_SIZE') / 1e6,
    'fds': len(os.listdir('/proc/self/fd')),  # noqa: PTH208 -- each name in /proc is one.
    'threads': len(os.listdir('/proc/self/task')),  # noqa: PTH208
    'shm': Path('/proc/self/maps').read_text(encoding='utf-8').count('/dev/shm/'),
    'shm_files': len(list(Path('/dev/shm').iterdir())),
    'children': sum(
      len(path.read_text(encoding='utf-8').split())
      for path in Path('/proc/self/task').glob('*/children')
    ),
    'arrays': len(jax.live_arrays()),
    'compiled': len(compiled),
  }


def log_resources(workdir: Path, compiled: list):
  """Append a line every second until the process ends."""
  with (workdir / 'resources.jsonl').open('w', buffering=1) as file:
    while True:
      # A thread or a checkpoint can disappear between listing and reading it.
      with contextlib.suppress(OSError):
        file.write(json.dumps(measure_resources(workdir, compiled)) + '\n')
      time.sleep(1)


def main(workdir: Path, steps: int):
  """Run it. Worker processes import this file too, and need neither jax nor `train`."""
  import jax

  from vit_jax.train import train

  workdir.mkdir(parents=True, exist_ok=True)
  compiled = []
  note = lambda event, seconds, **kwargs: (
    compiled.append(kwargs.get('fun_name')) if 'backend_compile' in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(note)
  threading.Thread(target=log_resources, args=(workdir, compiled), daemon=True).start()
  train(leak_config(steps), workdir)
  (workdir / 'compiled.json').write_text(json.dumps(compiled), encoding='utf-8')


if __name__ == '__main__':
  main(Path(sys.argv[1]), int(sys.argv[2]))
