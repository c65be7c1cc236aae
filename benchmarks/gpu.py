"""Compare training on one GPU with timm's same model, in images per second.

    python benchmarks/gpu.py [--batch 256] [--write] [VARIANT …]     B/16 and L/16
    python benchmarks/gpu.py --smoke                                 a tiny model, on any machine

Both sides use bfloat16 at 224 px, 1,000 classes, a uint8 batch that is already on the device, and
AdamW with float32 moments, weight decay and clipping. Ours is the step that `run_pretrain.py`
compiles. That of timm uses torch.compile, scaled dot-product attention, autocast and the fused
AdamW.

The sides run in separate processes, alternately, because each allocates the GPU's memory. Seconds
are medians. MFU counts 3 times the FLOPs of `Shape.flops`. --write adds the table to results.md.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

RESULTS = Path(__file__).parent / 'results.md'
TIMM = {
  'Ti/16': 'vit_tiny_patch16_224',
  'B/16': 'vit_base_patch16_224',
  'L/16': 'vit_large_patch16_224',
}
CLASSES, RATE, DECAY, CLIP = 1000, 1e-3, 0.1, 1.0


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


def ours(variant: str, args) -> dict:
  """Measure our step. Raises UserError if JAX has no GPU."""
  import jax

  from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
  from vit_jax.config_checks import validate
  from vit_jax.sharding.mesh import peak_flops, to_global
  from vit_jax.training.program import (
    abstract_state,
    compile_train_step,
    make_init_fn,
    make_program,
  )
  from vit_jax.training.task import make_task

  if jax.default_backend() != 'gpu' and not args.smoke:
    raise UserError(
      f"JAX has no GPU here ({jax.default_backend()}): pip install '.[gpu,parity]', beside "
      "NVIDIA's driver"
    )
  size = (args.size, args.size)
  config = Config(
    data=DataConfig(batch=args.batch, size=size),
    model=ModelConfig(variant=variant, dtype='bfloat16', unroll=0),
    optim=OptimConfig(
      name='adamw', lr=RATE, schedule='constant', weight_decay=DECAY, grad_clip_norm=CLIP
    ),
    steps=10**6,
  )
  device = jax.devices()[0]
  config = validate(config)
  program = make_program(
    config, make_task(config), examples=1_281_167, classes=CLASSES, label_slots=1, devices=[device]
  )
  model, mesh = program.model, program.mesh
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program))
  state = jax.jit(make_init_fn(program), out_shardings=shardings)(config.seed)
  update = functools.partial(compile_train_step(program), seed=np.int32(config.seed))
  images, labels = arrays(args.batch, args.size)
  batch = {
    'image': images,
    'label': labels[:, None].astype(np.int32),
    'mask': np.ones(args.batch, bool),
  }
  batch = to_global(batch, mesh)

  def step():
    nonlocal state
    state, _ = update(state, batch)

  seconds = seconds_of(step, lambda: jax.block_until_ready(state), args)
  flops = 3 * args.batch * model.shape.flops(size)
  facts = {
    'flops': flops,
    'peak': peak_flops(mesh),
    'device': device.device_kind,
    'with': f'jax {jax.__version__}',
  }
  return {'seconds': seconds} | facts


def theirs(variant: str, args) -> dict:
  """Measure timm's step. Raises UserError if PyTorch has no GPU."""
  import torch

  if not torch.cuda.is_available() and not args.smoke:
    raise UserError(
      f'PyTorch {torch.__version__} has no GPU here: take its build for CUDA (pytorch.org)'
    )
  import timm

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_float32_matmul_precision('high')
  model = (
    timm.create_model(TIMM[variant], num_classes=CLASSES, img_size=args.size).to(device).train()
  )
  adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=device == 'cuda')
  images, labels = (torch.from_numpy(array).to(device) for array in arrays(args.batch, args.size))

  def loss_of(images, labels):
    with torch.autocast(device, torch.bfloat16):
      logits = model((images.permute(0, 3, 1, 2).float() - 127.5) / 127.5)
    return torch.nn.functional.cross_entropy(logits.float(), labels)

  loss_of = loss_of if args.smoke else torch.compile(loss_of)

  def step():
    loss_of(images, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adamw.step()
    adamw.zero_grad(set_to_none=True)

  seconds = seconds_of(step, torch.cuda.synchronize if device == 'cuda' else lambda: None, args)
  return {'seconds': seconds, 'with': f'torch {torch.__version__}, timm {timm.__version__}'}


SIDES = {'ours': ours, 'theirs': theirs}


def in_turns(variant: str, args) -> dict[str, dict]:
  """Measure both sides in separate processes, and pool the seconds of all turns.

  Exits if a process fails.
  """
  found = {}
  for _ in range(args.turns):
    for side in SIDES:
      command = [sys.executable, __file__, *sys.argv[1:], '--side', f'{side}:{variant}']
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
      if done.returncode:
        sys.exit(done.returncode)
      one = json.loads(done.stdout.splitlines()[-1])
      found[side] = one | {'seconds': found.get(side, {}).get('seconds', []) + one['seconds']}
  return found


def row(variant: str, args, found: dict[str, dict]) -> str:
  """Return a line of the table."""
  ours, theirs = (float(np.median(found[side]['seconds'])) for side in SIDES)
  flops, peak = found['ours']['flops'], found['ours']['peak']
  mfu = lambda seconds: f'{flops / seconds / peak:.1%}' if peak else 'unknown'
  numbers = f'{args.batch / ours:14.1f} | {args.batch / theirs:14.1f} | {theirs / ours:5.2f}'
  return f'| {variant:5} | {args.batch:5} | {numbers} | {mfu(ours):>9} | {mfu(theirs):>9} |'


HEAD = """\
|       | batch | ours, images/s | timm, images/s | ratio | MFU, ours | MFU, timm |
|-------|-------|----------------|----------------|-------|-----------|-----------|"""


def main():
  """Print the table."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, count in {
    'batch': 256,
    'size': 224,
    'warm': 5,
    'steps': 20,
    'rounds': 3,
    'turns': 2,
  }.items():
    top.add_argument(f'--{name}', type=int, default=count)
  top.add_argument('--write', action='store_true', help='add the table to results.md')
  top.add_argument('--smoke', action='store_true')
  top.add_argument('--side', help=argparse.SUPPRESS)
  top.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(TIMM))
  args = top.parse_args()
  if args.smoke:
    args.batch, args.size, args.warm, args.steps, args.rounds, args.turns = 2, 32, 1, 1, 1, 1
  if args.side:
    side, _, variant = args.side.partition(':')
    print(json.dumps(SIDES[side](variant, args)))
    return
  if wrong := set(args.variants) - set(TIMM):
    raise UserError(f'{min(wrong)}: expected {", ".join(TIMM)}')
  table, variants = [HEAD], args.variants or (['Ti/16'] if args.smoke else ['B/16', 'L/16'])
  for variant in variants:
    found = in_turns(variant, args)
    table.append(row(variant, args, found))
  what = f'{found["ours"]["device"]}; {found["ours"]["with"]}, {found["theirs"]["with"]}'
  text = '\n'.join(table)
  print(f'{what}\n\n{text}')
  if args.write:
    before = RESULTS.read_text(encoding='utf-8').rstrip()
    RESULTS.write_text(
      f'{before}\n\n`python benchmarks/gpu.py` on one {what}:\n\n{text}\n',
      encoding='utf-8',
    )


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
