"""Measure the training step of one side, ours or timm's, in this process.

    python benchmarks/gpu_sides.py ours B/16 --batch 256        prints one line of JSON

Both sides use bfloat16 at 224 px, 1,000 classes, a uint8 batch that is already on the device, and
AdamW with float32 moments, weight decay and clipping. Ours is the step that `run_pretrain.py`
compiles. That of timm uses torch.compile, scaled dot-product attention, autocast, channels-last and
the fused AdamW. A side that runs out of memory prints {"out_of_memory": true}.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from vit_jax.errors import UserError

TIMM = {
  'Ti/16': 'vit_tiny_patch16_224',
  'S/16': 'vit_small_patch16_224',
  'B/16': 'vit_base_patch16_224',
  'L/16': 'vit_large_patch16_224',
  'H/14': 'vit_huge_patch14_224',
}
# Blocks in an iteration of our loop over depth; 0 means all. All blocks of the deep models in
# straight-line code would take a large part of ten minutes to compile.
UNROLL = {'L/16': 6, 'H/14': 4}
CLASSES, RATE, DECAY, CLIP = 1000, 1e-3, 0.1, 1.0
LOOP = {'size': 224, 'warm': 5, 'steps': 20, 'rounds': 3}  # Pixels, and how often a step is taken.
SMOKE = {'size': 32, 'warm': 1, 'steps': 1, 'rounds': 1}
GIB = 2**30


def arrays(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Return random uint8 images and their labels."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8), rng.integers(
    0, CLASSES, batch
  )


def seconds_of(step: Callable[[], None], wait: Callable[[], None], args) -> list[float]:
  """Return the mean seconds of a step in each round, after warm-up steps that compile."""
  for _ in range(args.warm):
    step()
  wait()
  seconds = []
  for _ in range(args.rounds):
    began = time.perf_counter()
    for _ in range(args.steps):
      step()
    wait()
    seconds.append((time.perf_counter() - began) / args.steps)
  return seconds


def our_config(variant: str, batch: int, size: int, *, smoke: bool):
  """Return the config of our step. A smoke test has one block."""
  from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
  from vit_jax.config_checks import validate

  config = Config(
    data=DataConfig(batch=batch, size=(size, size)),
    model=ModelConfig(
      variant=variant, dtype='bfloat16', unroll=UNROLL.get(variant, 0), depth=int(smoke)
    ),
    optim=OptimConfig(
      name='adamw', lr=RATE, schedule='constant', weight_decay=DECAY, grad_clip_norm=CLIP
    ),
    steps=10**6,
  )
  return validate(config)


def check_gpu(*, smoke: bool):
  """Raise UserError if JAX has no GPU, except in a smoke test."""
  import jax

  if jax.default_backend() != 'gpu' and not smoke:
    raise UserError(
      f"JAX has no GPU here ({jax.default_backend()}): pip install '.[gpu,parity]', beside "
      "NVIDIA's driver"
    )


def ours(args) -> dict:
  """Measure our step. Raises UserError if JAX has no GPU."""
  import jax

  from vit_jax.sharding.mesh import peak_flops, to_global
  from vit_jax.training.program import (
    abstract_state,
    compile_train_step,
    make_init_fn,
    make_program,
  )
  from vit_jax.training.task import make_task

  check_gpu(smoke=args.smoke)
  config = our_config(args.variant, args.batch, args.size, smoke=args.smoke)
  device = jax.devices()[0]
  program = make_program(
    config, make_task(config), examples=1_281_167, classes=CLASSES, label_slots=1, devices=[device]
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program))
  state = jax.jit(make_init_fn(program), out_shardings=shardings)(config.seed)
  began = time.perf_counter()
  compiled = compile_train_step(program)
  compile_seconds = time.perf_counter() - began
  update = functools.partial(compiled, seed=np.int32(config.seed))
  images, labels = arrays(args.batch, args.size)
  batch = {
    'image': images,
    'label': labels[:, None].astype(np.int32),
    'mask': np.ones(args.batch, bool),
  }
  batch = to_global(batch, program.mesh)

  def step():
    nonlocal state
    state, _ = update(state, batch)

  seconds = seconds_of(step, lambda: jax.block_until_ready(state), args)
  memory = compiled.memory_analysis()
  planned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    'seconds': seconds,
    'compile_seconds': compile_seconds,
    'peak_gib': ((device.memory_stats() or {}).get('peak_bytes_in_use') or 0) / GIB or None,
    'planned_gib': (planned + memory.temp_size_in_bytes) / GIB,
    'flops': 3 * args.batch * program.model.shape.flops((args.size, args.size)),
    'peak_flops': peak_flops(program.mesh),
    'device': device.device_kind,
    'with': f'jax {jax.__version__}',
  }


def theirs(args) -> dict:
  """Measure timm's step. Raises UserError if PyTorch has no GPU."""
  import torch

  if not torch.cuda.is_available() and not args.smoke:
    raise UserError(
      f'PyTorch {torch.__version__} has no GPU here: take its build for CUDA (pytorch.org)'
    )
  import timm

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_float32_matmul_precision('high')
  depth = {'depth': 1} if args.smoke else {}
  model = timm.create_model(TIMM[args.variant], num_classes=CLASSES, img_size=args.size, **depth)
  model = model.to(device, memory_format=torch.channels_last).train()
  adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=device == 'cuda')
  images, labels = (torch.from_numpy(array).to(device) for array in arrays(args.batch, args.size))

  def loss_of(images, labels):
    images = images.permute(0, 3, 1, 2)  # The bytes stay in place: this is channels-last.
    with torch.autocast(device, torch.bfloat16):
      logits = model((images.float() - 127.5) / 127.5)
    return torch.nn.functional.cross_entropy(logits.float(), labels)

  loss_of = loss_of if args.smoke else torch.compile(loss_of)

  def step():
    loss_of(images, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adamw.step()
    adamw.zero_grad(set_to_none=True)

  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  began = time.perf_counter()
  step()
  wait()
  compile_seconds = time.perf_counter() - began
  if device == 'cuda':
    torch.cuda.reset_peak_memory_stats()
  seconds = seconds_of(step, wait, args)
  return {
    'seconds': seconds,
    'compile_seconds': compile_seconds,
    'peak_gib': torch.cuda.max_memory_allocated() / GIB if device == 'cuda' else None,
    'with': f'torch {torch.__version__}, timm {timm.__version__}',
  }


SIDES = {'ours': ours, 'theirs': theirs}


def available_sides() -> list[str]:
  """Return the sides whose packages are installed: ours, and timm's if $TIMM_PYTHON is set."""
  has_timm = 'TIMM_PYTHON' in os.environ or all(map(importlib.util.find_spec, ('torch', 'timm')))
  return list(SIDES) if has_timm else ['ours']


def measure_in_process(side: str, variant: str, batch: int, *, smoke: bool) -> dict | None:
  """Measure a side in a separate process, because each allocates the GPU's memory.

  Returns None if the side runs out of memory. Exits if the process fails.
  """
  python = os.environ.get('TIMM_PYTHON', sys.executable) if side == 'theirs' else sys.executable
  command = [python, __file__, side, variant, '--batch', str(batch)]
  command += ['--smoke'] if smoke else []
  # By default, JAX takes three quarters of the memory, and PyTorch all that it needs.
  environment = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'} | os.environ
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
  if done.returncode:
    sys.exit(done.returncode)
  found = json.loads(done.stdout.splitlines()[-1])
  return None if found.get('out_of_memory') else found


def is_out_of_memory(error: RuntimeError) -> bool:
  """Return whether an error of JAX or PyTorch says that the device's memory is full."""
  text = str(error)
  return 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower()


def main():
  """Print the measurement."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('side', choices=SIDES)
  top.add_argument('variant', choices=TIMM)
  top.add_argument('--batch', type=int, required=True)
  top.add_argument('--smoke', action='store_true', help='a tiny size, on any machine')
  args = top.parse_args()
  vars(args).update(SMOKE if args.smoke else LOOP)
  try:
    found = SIDES[args.side](args)
  except RuntimeError as error:
    if not is_out_of_memory(error):
      raise
    found = {'out_of_memory': True}
  print(json.dumps(found))


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
