"""Check on one GPU that it computes what the CPU computes.

    python benchmarks/gpu_correctness.py [--csv FILE]
    python benchmarks/gpu_correctness.py --smoke        a tiny model, on any machine

From the same parameters and batches, in float32 on the CPU and on the GPU: logits, and the losses
of a trajectory with momentum. Once with products in full float32, and once as the GPU computes them
by default (TensorFloat-32). Then bfloat16 against float32 on the GPU, and attention by cuDNN in
bfloat16 against XLA in float32: the output and its gradients, at the tokens of several models.

Each line has its limit. The exit code is 1 if one is exceeded.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu import publish
from gpu_sides import check_gpu

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.models.attention import ATTENTION_IMPLEMENTATIONS, MAX_KERNEL_ERROR
from vit_jax.sharding.mesh import shard_from_host, to_global
from vit_jax.step import predict_logits
from vit_jax.training.program import abstract_state, compile_train_step, make_init_fn, make_program
from vit_jax.training.task import make_task

# Relative errors. Those of float32 and TensorFloat-32 are about a hundred times what a sum over a
# thousand terms loses; the others allow for their type's 8 bits through twelve blocks.
LIMITS = {
  'logits, float32': 1e-4,
  'losses, float32': 1e-4,
  'logits, default precision': 2e-2,
  'losses, default precision': 1e-2,
  'logits, bfloat16': 6e-2,
  'losses, bfloat16': 2e-2,
}
# Tokens, heads and channels of a head.
ATTENTION_SHAPES = {
  'B/16': (197, 12, 64), 'S/16': (197, 6, 64), 'H/14': (257, 16, 80), 'L/16 at 384': (577, 16, 64),
}  # fmt: skip


def make_config(variant: str, batch: int, size: int) -> Config:
  """Return the config of the trajectory. Its learning rate is too small for chaos."""
  return Config(
    data=DataConfig(batch=batch, size=(size, size)),
    model=ModelConfig(variant=variant, unroll=0),
    optim=OptimConfig(name='sgd', lr=1e-3, schedule='constant', grad_clip_norm=1.0),
    steps=10**6,
  )


def make_batches(config: Config, steps: int) -> list[dict[str, np.ndarray]]:
  """Return random batches."""
  rng = np.random.default_rng(0)
  b, size = config.data.batch, config.data.size
  return [
    {
      'image': rng.integers(0, 256, (b, *size, 3), dtype=np.uint8),
      'label': rng.integers(0, 10, (b, 1)).astype(np.int32),
      'mask': np.ones(b, bool),
    }
    for _ in range(steps)
  ]


def program_on(config: Config, device: jax.Device):
  """Return the program of a config on a device."""
  config = validate(config)
  return make_program(
    config, make_task(config), examples=50_000, classes=10, label_slots=1, devices=[device]
  )


def initial_state(program):
  """Return the train state on the host, with a random head. The logits of a new one are 0."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program))
  state = jax.jit(make_init_fn(program), out_shardings=shardings)(0)
  state = jax.tree.map(np.asarray, state)
  head = state.params['head']['kernel']
  random = np.random.default_rng(1).normal(scale=0.05, size=head.shape).astype(head.dtype)
  params = state.params | {'head': state.params['head'] | {'kernel': random}}
  return dataclasses.replace(state, params=params)


def logits_and_losses(
  config: Config, device: jax.Device, state, batches: list[dict], precision: str | None
) -> tuple[np.ndarray, np.ndarray]:
  """Return the first batch's logits, and the loss of each step, on a device."""
  with jax.default_matmul_precision(precision):
    program = program_on(config, device)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program))
    predict = jax.jit(functools.partial(predict_logits, model=program.model))
    with jax.set_mesh(program.mesh):
      state = shard_from_host(state, shardings)
      logits = np.asarray(predict(state.params, to_global(batches[0], program.mesh)['image']))
    update, losses = compile_train_step(program), []
    for batch in batches:
      state, metrics = update(state, to_global(batch, program.mesh), seed=np.int32(0))
      losses.append(float(metrics['loss']))
  return logits.astype(np.float32), np.array(losses)


def relative_error(actual, expected) -> float:
  """Return the relative error in the Euclidean norm."""
  actual, expected = (np.asarray(x, np.float64).ravel() for x in (actual, expected))
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def model_errors(variant: str, batch: int, size: int, steps: int) -> dict[str, float]:
  """Return {name: error} of logits and losses."""
  config = make_config(variant, batch, size)
  cpu, device = jax.devices('cpu')[0], jax.devices()[0]
  batches = make_batches(config, steps)
  state = initial_state(program_on(config, cpu))
  bfloat16 = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype='bfloat16'))
  run = functools.partial(logits_and_losses, state=state, batches=batches)
  expected = run(config, cpu, precision='float32')
  full = run(config, device, precision='float32')
  default = run(config, device, precision=None)
  half = run(bfloat16, device, precision=None)
  errors = {}
  for name, actual, reference in (
    ('float32', full, expected),
    ('default precision', default, expected),
    ('bfloat16', half, full),
  ):
    errors[f'logits, {name}'] = relative_error(actual[0], reference[0])
    errors[f'losses, {name}'] = float(np.abs(actual[1] / reference[1] - 1).max())
  return errors


def attention_errors(implementation: str, n: int, heads: int, c: int) -> dict[str, float]:
  """Return the errors of an implementation in bfloat16 against XLA in float32."""
  shapes = {'x': (2, n, 3 * heads * c), 'bias': (3 * heads * c,), 'do': (2, n, heads * c)}
  x, bias, do = (
    jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    for i, shape in enumerate(shapes.values())
  )

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def output_and_gradients(name, dtype, x, bias, do):
    attention = functools.partial(ATTENTION_IMPLEMENTATIONS[name], heads=heads)
    out, vjp = jax.vjp(attention, x.astype(dtype), bias.astype(dtype))
    return out, *vjp(do.astype(dtype))

  actual = output_and_gradients(implementation, jnp.bfloat16, x, bias, do)
  with jax.default_matmul_precision('float32'):
    expected = output_and_gradients('xla', jnp.float32, x, bias, do)
  names = ('output', 'gradient of qkv', 'gradient of the bias')
  return {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def all_errors(args: argparse.Namespace) -> list[tuple[str, str, float, float]]:
  """Return (model, check, error, limit) of every check."""
  variant, batch, size, steps = ('mu/8', 2, 16, 3) if args.smoke else ('B/16', 8, 224, 20)
  errors = model_errors(variant, batch, size, steps)
  found = [(variant, check, error, LIMITS[check]) for check, error in errors.items()]
  # cuDNN is for GPUs alone. A smoke test compares XLA in two types.
  implementation = 'xla' if jax.default_backend() == 'cpu' else 'cudnn'
  shapes = {'mu/8': (5, 2, 16)} if args.smoke else ATTENTION_SHAPES
  for model, shape in shapes.items():
    for check, error in attention_errors(implementation, *shape).items():
      found.append((model, f'{implementation} attention, {check}', error, MAX_KERNEL_ERROR))
  return found


def main():
  """Print the table, and exit with 1 if an error exceeds its limit."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('--csv', type=Path, metavar='FILE', help='write the table to FILE')
  top.add_argument('--smoke', action='store_true', help='a tiny size, on any machine')
  args = top.parse_args()
  check_gpu(smoke=args.smoke)
  rows = [
    {
      'model': model,
      'check': check,
      'error': f'{error:.2e}',
      'limit': f'{limit:.0e}',
      'verdict': 'pass' if error <= limit else 'FAIL',  # NaN fails.
      'device': jax.devices()[0].device_kind,
      'versions': f'jax {jax.__version__}',
    }
    for model, check, error, limit in all_errors(args)
  ]
  publish(rows, args.csv)
  if any(each['verdict'] == 'FAIL' for each in rows):
    sys.exit(1)


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
