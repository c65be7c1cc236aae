"""Compare our training step with a plain linen Vision Transformer, in seconds.

    python benchmarks/step.py [--rounds 12] [--steps 5] [SHAPE …]

The plain model is what a good engineer writes in an hour: blocks in a Python loop,
`nn.MultiHeadDotProductAttention`, `nn.Dense`, and a convolution for the patches. Width, depth,
loss, batch and AdamW are the same.

Both alternate in one process, so that other load on the machine affects both. A turn is a few
consecutive steps, as in a run, after one step that is not counted, because it finds the other
model's data in the caches. The ratio is that of the medians over turns, of wall time and of the
time of all cores. Below 1, ours is faster. Ours accumulates gradients over parts of the batch, as
configs/quickstart.py does: the activations of a part are small and stay in the cache.
"""

import argparse
import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import ModelConfig
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.step import TrainState, train_step

# The model, the images' size, a batch, and its parts.
SHAPES = {
  'quickstart': (
    ModelConfig(variant='Ti/7', width=128, depth=4, mlp=256, heads=4, pool='gap', unroll=0),
    (28, 28),
    96,
    4,
  ),
  'Ti/16': (ModelConfig(variant='Ti/16', unroll=0), (224, 224), 8, 4),
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


def stepper(model, size: tuple[int, int], b: int, parts: int):
  """Return a function that takes consecutive steps.

  It returns the mean wall seconds of a step, and those of all cores, without the first step.
  """
  rng = np.random.default_rng(0)
  batch = jax.device_put(
    {
      'image': rng.integers(0, 256, (b, *size, 3), dtype=np.uint8),
      'label': rng.integers(0, 10, (b, 1)).astype(np.int32),
      'mask': np.ones(b, bool),
    }
  )
  tx = optax.adamw(1e-3)
  params = jax.jit(model.init)(jax.random.key(0), batch['image'][:1])['params']
  state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=None)
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    loss=softmax_loss,
    lr=lambda step: 1e-3,
    seed=0,
    grad_accum_steps=parts,
  )
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

  def turn(steps: int) -> np.ndarray:
    nonlocal state
    seconds = []
    for _ in range(1 + steps):
      began = time.perf_counter(), time.process_time()
      state, metrics = compiled(state, batch)
      jax.block_until_ready((state, metrics))
      seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return np.mean(seconds[1:], axis=0)

  return turn


def main():
  args = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  args.add_argument('--rounds', type=int, default=12)
  args.add_argument('--steps', type=int, default=5, help='in a turn')
  args.add_argument(
    'shapes', nargs='*', default=list(SHAPES), metavar='SHAPE', help=' or '.join(SHAPES)
  )
  args = args.parse_args()
  for name in args.shapes:
    config, size, b, parts = SHAPES[name]
    ours = build_vit(config, 10)
    plain = PlainVit(config, ours.shape, 10)
    steppers = {'ours': stepper(ours, size, b, parts), 'plain': stepper(plain, size, b, 1)}
    seconds = {side: [] for side in steppers}
    for _ in range(args.rounds):
      for side, turn in steppers.items():
        seconds[side].append(turn(args.steps))
    (ours, ours_cpu), (plain, plain_cpu) = (
      1000 * np.median(seconds[side], axis=0) for side in ('ours', 'plain')
    )
    print(
      f'{name:12} batch {b:4}  ours {ours:8.1f} ms ({ours_cpu:.1f} of CPU)  plain {plain:8.1f} ms '
      f'({plain_cpu:.1f} of CPU)  '
      f'ratio {ours / plain:.3f} ({ours_cpu / plain_cpu:.3f})  ({jax.devices()[0].device_kind}, '
      f'jax {jax.__version__})'
    )


if __name__ == '__main__':
  main()
