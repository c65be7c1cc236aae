"""Measure training from JPEG files on one GPU: the input alone, the step alone, and both together.

    python benchmarks/gpu_input.py [--csv FILE] [--photos DIR] [VARIANT …]
    python benchmarks/gpu_input.py --smoke

DIR has the folders train/CLASS and val/CLASS. Without it, 1,000 JPEG files of 500 x 375 pixels are
written. Photos are read again and again, from the page cache: decoding is measured, and no disk.
Both together is the loop of `vit_jax/train.py` without its log. `lost` is the share of the speed of
the step alone that the input costs.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import jax
import numpy as np
from gpu import publish
from gpu_sides import TIMM, UNROLL, check_gpu

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.loader import train_batches
from vit_jax.data.prefetch import host_kwargs
from vit_jax.errors import UserError
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.training.program import abstract_state, compile_train_step, make_init_fn
from vit_jax.training.setup import Run, set_up

BATCH = {'Ti/16': 8, 'S/16': 512, 'B/16': 256, 'L/16': 128, 'H/14': 64}
WORKERS = 14  # Processes at most; one core feeds the device, and one the loop.


def write_photos(folder: Path, count: int):
  """Write JPEG files of smooth noise, which takes about as many bytes as a photo."""
  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC)
    for split in ('train', 'val') if i < 4 else ('train',):
      path = folder / split / 'ab'[i % 2] / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(cv2.imencode('.jpg', image)[1].tobytes())


def make_config(variant: str, folder: Path, *, smoke: bool) -> Config:
  """Return the config of a run on the photos: the inception crop and flips."""
  side = 32 if smoke else 224
  workers = 0 if smoke else min(WORKERS, max(1, len(os.sched_getaffinity(0)) - 2))
  return Config(
    data=DataConfig(
      train=f'folder:{folder}',
      eval_split='val',
      batch=BATCH[variant],
      size=(side, side),
      workers=workers,
    ),
    model=ModelConfig(
      variant=variant, dtype='bfloat16', unroll=UNROLL.get(variant, 0), depth=int(smoke)
    ),
    optim=OptimConfig(
      name='adamw', lr=1e-4, schedule='constant', weight_decay=0.1, grad_clip_norm=1.0
    ),
    steps=10**6,
  )


def input_seconds(run: Run, warm: int, steps: int) -> float:
  """Return the seconds in which the host makes a batch, after batches that are not counted."""
  batches = train_batches(
    run.train_source,
    run.config.data,
    seed=0,
    start=0,
    model=run.config.model,
    **host_kwargs(),
  )
  for _ in itertools.islice(batches, warm):
    pass
  began = time.perf_counter()
  for _ in itertools.islice(batches, steps):
    pass
  seconds = (time.perf_counter() - began) / steps
  batches.close()
  return seconds


def loop_seconds(
  update: Callable, state, batches: Iterator, warm: int, steps: int
) -> tuple[object, float]:
  """Return (the state, seconds of a step), after steps that are not counted."""
  for i in range(warm + steps):
    if i == warm:
      jax.block_until_ready(state)
      began = time.perf_counter()
    _, batch = next(batches)
    state, _ = update(state, batch, seed=np.int32(0))
  jax.block_until_ready(state)
  return state, (time.perf_counter() - began) / steps


def measure(variant: str, folder: Path, *, smoke: bool) -> dict[str, object]:
  """Return a row of the table."""
  warm, steps = (1, 2) if smoke else (10, 60)
  with tempfile.TemporaryDirectory() as workdir:
    run = set_up(make_config(variant, folder, smoke=smoke), Path(workdir), Watchdog())
    alone = input_seconds(run, warm, steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run.program))
    state = jax.jit(make_init_fn(run.program), out_shardings=shardings)(0)
    update, batches = compile_train_step(run.program), run.batches(0)
    fixed = next(batches)
    state, step = loop_seconds(update, state, itertools.repeat(fixed), warm, steps)
    _, both = loop_seconds(update, state, batches, warm, steps)
  b = run.config.data.batch
  return {
    'model': variant,
    'batch': b,
    'workers': run.config.data.workers,
    'cores': len(os.sched_getaffinity(0)),
    'input_images_per_second': f'{b / alone:.1f}',
    'step_images_per_second': f'{b / step:.1f}',
    'both_images_per_second': f'{b / both:.1f}',
    'lost': f'{max(0.0, 1 - step / both):.4f}',
    'device': jax.devices()[0].device_kind,
    'versions': f'jax {jax.__version__}',
  }


def main():
  """Print the table."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('--csv', type=Path, metavar='FILE', help='write the table to FILE')
  top.add_argument('--photos', type=Path, metavar='DIR', help='photos in train/CLASS, val/CLASS')
  top.add_argument('--smoke', action='store_true', help='a tiny size, on any machine')
  top.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(BATCH))
  args = top.parse_args()
  if wrong := set(args.variants) - set(TIMM):
    raise UserError(f'{min(wrong)}: expected {", ".join(TIMM)}')
  check_gpu(smoke=args.smoke)
  with tempfile.TemporaryDirectory() as written:
    if not args.photos:
      write_photos(Path(written), 16 if args.smoke else 1000)
    folder = args.photos or Path(written)
    variants = args.variants or (['Ti/16'] if args.smoke else ['B/16', 'S/16'])
    rows = [measure(variant, folder, smoke=args.smoke) for variant in variants]
  publish(rows, args.csv)


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
