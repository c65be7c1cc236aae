"""Train a small ViT on CIFAR-10 by vit_jax and by an independent PyTorch trainer, and compare.

    python benchmarks/matched_training.py FOLDER --out DIR [--seeds 3] [--epochs 5] [--patch 8]

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. Both sides train timm's ViT of width 192 and
depth 4 in float32 by the same recipe. Images are padded by 4 pixels by reflection, cropped at
random and flipped, in batches of 128. The optimizer is AdamW with weight decay of the kernels,
clipping, 5 % warm-up and a cosine. Labels are smoothed. Initial parameters have the same
distributions. Order, crops and parameters are drawn by each side's own generators. So the
accuracies agree up to the deviation over seeds.

The sides alternate, each in its own process. Time is that of training alone, without the start, the
compilation and the evaluation, and with the reading of the images. results.jsonl in DIR has a line
for each side and seed; those that are there are not repeated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BATCH, SIZE, PAD, CLASSES = 128, 32, 4, 10
WIDTH, DEPTH, HEADS, MLP = 192, 4, 3, 768
RATE, DECAY, CLIP, SMOOTHING, WARMUP, BETAS = 1e-3, 0.05, 1.0, 0.1, 0.05, (0.9, 0.999)


def ours(args, seed: int) -> dict:
  """Train by vit_jax, as `vit-jax train` does."""
  from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
  from vit_jax.config_checks import validate
  from vit_jax.metrics.records import read_metrics
  from vit_jax.train import train

  config = Config(
    data=DataConfig(
      train=f'folder:{args.folder}',
      batch=BATCH,
      eval_batch=500,
      size=(SIZE, SIZE),
      crop='simple',
    ),
    model=ModelConfig(
      variant=f'Ti/{args.patch}', width=WIDTH, depth=DEPTH, heads=HEADS, mlp=MLP, gelu='erf',
      unroll=0,
    ),
    optim=OptimConfig(
      name='adamw', lr=RATE, schedule='cosine', warmup=f'{100 * WARMUP:g}%', weight_decay=DECAY,
      weight_decay_mask='.*/kernel', grad_clip_norm=CLIP, b1=BETAS[0], b2=BETAS[1],
      grad_accum_steps=4,
    ),
    label_smoothing=SMOOTHING,
    seed=seed,
    epochs=args.epochs,
    eval_every='0',
    save_every='0',
    log_every='5%',
  )  # fmt: skip
  workdir = args.out / f'ours-{seed}-{args.epochs:g}-{args.patch}'
  result = train(validate(config), workdir)
  records = [each for each in read_metrics(workdir) if 'seconds_per_step' in each]
  seconds = [each['seconds_per_step'] for each in records]
  steps = round(args.epochs * 50_000 / BATCH)
  return {'accuracy': 100 * result['test_accuracy'], 'seconds': float(np.mean(seconds)) * steps}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Return uint8 images [n, h, w, 3] and labels [n], read by Pillow."""
  from PIL import Image

  classes = sorted(path.name for path in (folder / split).iterdir())
  paths = [
    (path, i) for i, name in enumerate(classes) for path in (folder / split / name).iterdir()
  ]
  images = np.stack([np.asarray(Image.open(path).convert('RGB')) for path, _ in paths])
  return images, np.array([i for _, i in paths])


def make_model(patch: int):
  """Return timm's model with the initial distributions of vit_jax/models/vit.py."""
  import torch
  from timm.models.vision_transformer import VisionTransformer
  from torch.nn import init

  model = VisionTransformer(
    img_size=SIZE, patch_size=patch, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
    mlp_ratio=MLP / WIDTH, num_classes=CLASSES,
  )  # fmt: skip
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name == 'cls_token' or name.startswith('head.') or name.endswith('bias'):
        p.zero_()
      elif name == 'pos_embed':
        p.normal_(std=0.02)
      elif name == 'patch_embed.proj.weight':
        std = 1 / math.sqrt(3 * patch**2) / 0.87962566  # Truncation makes it smaller.
        init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
      elif name.endswith('qkv.weight'):
        for third in p.chunk(3):
          init.xavier_uniform_(third)
      elif p.ndim == 2:
        init.xavier_uniform_(p)
  return model


def augment(images, rng: np.random.Generator):
  """Return float images [b, 3, h, w]: padded, cropped at random, half of them flipped."""
  import torch

  padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode='reflect')
  out = np.empty_like(images)
  corners, flips = rng.integers(0, 2 * PAD + 1, (len(images), 2)), rng.random(len(images)) < 0.5
  for i, ((y, x), flip) in enumerate(zip(corners, flips, strict=True)):
    crop = padded[i, y : y + SIZE, x : x + SIZE]
    out[i] = crop[:, ::-1] if flip else crop
  return to_input(torch.from_numpy(out))


def to_input(images):
  """Return uint8 [b, h, w, 3] as float [b, 3, h, w] from -1 to 1."""
  return (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5


def learning_rate(step: int, steps: int) -> float:
  """Return the cosine decay after a linear warm-up."""
  warmup = round(WARMUP * steps)
  decayed = RATE * (1 + math.cos(math.pi * max(step - warmup, 0) / (steps - warmup))) / 2
  return decayed * min(1, step / warmup)


def theirs(args, seed: int) -> dict:
  """Train in plain PyTorch. All images are read before the clock starts."""
  import torch
  from torch.nn import functional

  torch.manual_seed(seed)
  rng = np.random.default_rng(seed)
  (images, labels), (test, test_labels) = (
    read_split(args.folder, split) for split in ('train', 'test')
  )
  model = make_model(args.patch)
  kernels = [p for p in model.parameters() if p.ndim in (2, 4)]
  others = [p for p in model.parameters() if p.ndim not in (2, 4)]
  groups = [{'params': kernels, 'weight_decay': DECAY}, {'params': others, 'weight_decay': 0.0}]
  adamw = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
  steps, order = round(args.epochs * len(images) / BATCH), np.zeros(0, int)
  began = time.perf_counter()
  for step in range(steps):
    if len(order) < BATCH:
      order = np.concatenate([order, rng.permutation(len(images))])
    chosen, order = order[:BATCH], order[BATCH:]
    for group in adamw.param_groups:
      group['lr'] = learning_rate(step, steps)
    target = torch.from_numpy(labels[chosen])
    loss = functional.cross_entropy(
      model(augment(images[chosen], rng)), target, label_smoothing=SMOOTHING
    )
    adamw.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adamw.step()
    if step % 100 == 99:
      spent = time.perf_counter() - began
      print(f'step {step + 1}/{steps}  loss {loss.item():.4f}  {spent:.0f} s', file=sys.stderr)
  seconds = time.perf_counter() - began
  model.eval()
  with torch.inference_mode():
    parts = torch.from_numpy(test).split(500)
    predicted = torch.cat([model(to_input(part)).argmax(dim=1) for part in parts]).numpy()
  return {'accuracy': 100 * float(np.mean(predicted == test_labels)), 'seconds': seconds}


SIDES = {'ours': ours, 'theirs': theirs}


def run_side(side: str, seed: int, args, path: Path):
  """Train one side in another process, and append its result."""
  command = [sys.executable, __file__, *sys.argv[1:], '--side', f'{side}:{seed}']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
  if done.returncode:
    sys.exit(done.returncode)
  line = {'side': side, 'seed': seed, 'epochs': args.epochs, 'patch': args.patch}
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(line | json.loads(done.stdout.splitlines()[-1])) + '\n')


def describe(rows: list[dict]) -> str:
  """Return the means, deviations, and the ratio of the times."""
  lines, seconds = [], {}
  for side in SIDES:
    accuracies = [row['accuracy'] for row in rows if row['side'] == side]
    seconds[side] = np.mean([row['seconds'] for row in rows if row['side'] == side])
    deviation = np.std(accuracies, ddof=1) if len(accuracies) > 1 else math.nan
    lines.append(
      f'{side:7} {np.mean(accuracies):.2f} ± {deviation:.2f} %  ({len(accuracies)} seeds, '
      f'{seconds[side]:.0f} s each)'
    )
  return '\n'.join([*lines, f'ratio of the times {seconds["ours"] / seconds["theirs"]:.2f}'])


def main():
  """Train what is missing, and print the comparison."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('folder', type=Path)
  top.add_argument('--out', type=Path, required=True)
  top.add_argument('--seeds', type=int, default=3)
  top.add_argument('--epochs', type=float, default=5.0)
  top.add_argument('--patch', type=int, default=8)
  top.add_argument('--side', help=argparse.SUPPRESS)
  args = top.parse_args()
  if args.side:
    side, _, seed = args.side.partition(':')
    print(json.dumps(SIDES[side](args, int(seed))))
    return
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / 'results.jsonl'
  for seed in range(args.seeds):
    for side in SIDES:
      found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
      key = (side, seed, args.epochs, args.patch)
      if key not in [(row['side'], row['seed'], row['epochs'], row['patch']) for row in found]:
        run_side(side, seed, args, path)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  print(describe([r for r in rows if (r['epochs'], r['patch']) == (args.epochs, args.patch)]))


if __name__ == '__main__':
  main()
