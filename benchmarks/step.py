"""Compare our training step, or inference, with a plain linen model and with timm, in seconds.

    python benchmarks/step.py [--rounds 12] [--steps 5] [--inference] [--sides plain,timm] [SHAPE …]

The plain model is what a good engineer writes in an hour: blocks in a Python loop,
`nn.MultiHeadDotProductAttention`, `nn.Dense`, and a convolution for the patches. timm's
VisionTransformer runs in PyTorch, as it is (`timm`) and with torch.compile (`compiled`). Width,
depth, loss, batch, AdamW and float32 are the same everywhere.

All alternate in one process, so that other load on the machine affects each. A turn is a few
consecutive steps, as in a run, after one step that is not counted, because it finds the other
model's data in the caches. The ratio is that of the medians over turns, of wall time and of the
time of all cores. Below 1, ours is faster.

All sides have huge pages of memory, as the commands of vit_jax have (runtime/huge_pages.py).
GLIBC_TUNABLES=glibc.malloc.hugetlb=0 measures without.
"""

import argparse
import functools
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import ModelConfig
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.runtime.huge_pages import restart_with_huge_pages
from vit_jax.step import TrainState, train_step

CLASSES, RATE, DECAY = 10, 1e-3, 1e-4
# The model, the images' size, and a batch.
SHAPES = {
  'quickstart': (
    ModelConfig(variant='Ti/7', width=128, depth=4, mlp=256, heads=4, pool='gap', unroll=0),
    (28, 28),
    96,
  ),
  'Ti/16': (ModelConfig(variant='Ti/16', unroll=0), (224, 224), 16),
  'S/16': (ModelConfig(variant='S/16', unroll=0), (224, 224), 16),
}


class PlainVit(nn.Module):
  """The paper's model, built from linen's modules."""

  config: ModelConfig
  shape: object
  classes: int

  @nn.compact
  def __call__(self, images, train=False):
    s = self.shape
    x = nn.Conv(s.width, s.patch, strides=s.patch, padding='VALID')(
      images.astype(jnp.float32) / 127.5 - 1
    )
    x = x.reshape(x.shape[0], -1, s.width)
    if self.config.pool == 'token':
      token = self.param('cls', nn.initializers.zeros, (1, 1, s.width))
      x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
    x = x + self.param('position', nn.initializers.normal(0.02), (1, *x.shape[1:]))
    for _ in range(s.depth):
      x = x + nn.MultiHeadDotProductAttention(num_heads=s.heads)(nn.LayerNorm()(x))
      hidden = nn.gelu(nn.Dense(s.mlp)(nn.LayerNorm()(x)))
      x = x + nn.Dense(s.width)(hidden)
    x = nn.LayerNorm()(x)
    return nn.Dense(self.classes, kernel_init=nn.initializers.zeros)(
      x[:, 0] if self.config.pool == 'token' else x.mean(axis=1)
    )


def draw_batch(size: tuple[int, int], b: int) -> dict[str, np.ndarray]:
  """Return random images and labels."""
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (b, *size, 3), dtype=np.uint8),
    'label': rng.integers(0, CLASSES, (b, 1)).astype(np.int32),
    'mask': np.ones(b, bool),
  }


def jax_step(model, size: tuple[int, int], b: int) -> Callable[[], None]:
  """Return a training step of a linen model."""
  batch = jax.device_put(draw_batch(size, b))
  tx = optax.adamw(RATE, weight_decay=DECAY)
  params = jax.jit(model.init)(jax.random.key(0), batch['image'][:1])['params']
  state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=None)
  update = functools.partial(
    train_step,
    model=model,
    tx=tx,
    loss=softmax_loss,
    lr=lambda step: RATE,
    seed=0,
  )
  compiled = jax.jit(update, donate_argnums=0).lower(state, batch).compile()

  def step():
    nonlocal state
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))

  return step


def jax_inference(model, size: tuple[int, int], b: int) -> Callable[[], None]:
  """Return a forward pass of a linen model."""
  images = jax.device_put(draw_batch(size, b)['image'])
  params = jax.jit(model.init)(jax.random.key(0), images[:1])['params']
  forward = jax.jit(lambda params, images: model.apply({'params': params}, images))
  return lambda: jax.block_until_ready(forward(params, images))


def make_timm(config: ModelConfig, size: tuple[int, int]):
  """Return timm's model of the same shape."""
  from timm.models.vision_transformer import VisionTransformer

  s = build_vit(config, CLASSES).shape
  return VisionTransformer(
    img_size=size,
    patch_size=s.patch,
    embed_dim=s.width,
    depth=s.depth,
    num_heads=s.heads,
    mlp_ratio=s.mlp / s.width,
    num_classes=CLASSES,
    class_token=config.pool == 'token',
    global_pool='token' if config.pool == 'token' else 'avg',
    fc_norm=False,
  )


def timm_step(
  config: ModelConfig, size: tuple[int, int], b: int, *, inference: bool, compiled: bool
) -> Callable[[], None]:
  """Return a training step, or a forward pass, of timm's model."""
  import torch

  batch = draw_batch(size, b)
  images, labels = torch.from_numpy(batch['image']), torch.from_numpy(batch['label'][:, 0]).long()
  model = make_timm(config, size).train(not inference)
  adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)

  def logits_of(images):
    return model((images.permute(0, 3, 1, 2).float() - 127.5) / 127.5)

  logits_of = torch.compile(logits_of) if compiled else logits_of

  def train():
    torch.nn.functional.cross_entropy(logits_of(images), labels).backward()
    adamw.step()
    adamw.zero_grad(set_to_none=True)

  @torch.inference_mode()
  def infer():
    logits_of(images)

  return infer if inference else train


def turn_of(step: Callable[[], None], steps: int) -> np.ndarray:
  """Return the mean wall seconds of a step, and those of all cores, without the first step."""
  seconds = []
  for _ in range(1 + steps):
    began = time.perf_counter(), time.process_time()
    step()
    seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
  return np.mean(seconds[1:], axis=0)


def make_steps(name: str, sides: list[str], *, inference: bool) -> dict[str, Callable[[], None]]:
  """Return {side: step} of a shape, ours first."""
  config, size, b = SHAPES[name]
  model = build_vit(config, CLASSES)
  build = jax_inference if inference else jax_step
  steps = {'ours': build(model, size, b)}
  if 'plain' in sides:
    steps['plain'] = build(PlainVit(config, model.shape, CLASSES), size, b)
  if 'timm' in sides:
    make = functools.partial(timm_step, config, size, b, inference=inference)
    steps |= {'timm': make(compiled=False), 'compiled': make(compiled=True)}
  return steps


def measure(steps: dict[str, Callable[[], None]], args) -> dict[str, np.ndarray]:
  """Return {side: (wall milliseconds, those of all cores)}, medians over turns."""
  seconds = {side: [] for side in steps}
  for _ in range(args.rounds):
    for side, step in steps.items():
      seconds[side].append(turn_of(step, args.steps))
  return {side: 1000 * np.median(values, axis=0) for side, values in seconds.items()}


def main():
  """Print a line for each shape and side."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('--rounds', type=int, default=12)
  top.add_argument('--steps', type=int, default=5, help='in a turn')
  top.add_argument('--inference', action='store_true', help='the forward pass alone')
  top.add_argument('--sides', default='plain', help='plain, timm, or both with a comma between')
  top.add_argument(
    'shapes', nargs='*', default=list(SHAPES), metavar='SHAPE', help=' or '.join(SHAPES)
  )
  args = top.parse_args()
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  for name in args.shapes:
    found = measure(make_steps(name, args.sides.split(','), inference=args.inference), args)
    ours = found.pop('ours')
    for side, theirs in found.items():
      wall, cpu = ours / theirs
      print(
        f'{name:12} batch {SHAPES[name][2]:4}  ours {ours[0]:8.1f} ms ({ours[1]:.1f} of CPU)  '
        f'{side:8} {theirs[0]:8.1f} ms ({theirs[1]:.1f} of CPU)  ratio {wall:.3f} ({cpu:.3f})',
        flush=True,
      )


if __name__ == '__main__':
  restart_with_huge_pages()
  main()
