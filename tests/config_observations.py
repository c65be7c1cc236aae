"""What a config changes: programs, batches, schedules, and the results of short runs."""

import functools
import itertools
import json
import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  total_steps,
)
from vit_jax.data import images
from vit_jax.data.loader import eval_batches, max_bad_examples, train_batches
from vit_jax.errors import DivergedError, UserError
from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh
from vit_jax.step import abstract_params, init_state, train_step
from vit_jax.train import train
from vit_jax.training.setup import open_sources, restore_or_init_state
from vit_jax.training.task import make_task

TINY = Config(
  data=DataConfig(
    train='builtin:digits', split='train[:64]', eval_split='test[:32]', batch=8, size=(8, 8)
  ),
  model=ModelConfig(variant='mu/4', depth=2),
  optim=OptimConfig(name='sgd', lr=0.1),
  steps=4,
  log_every='1',
  eval_every='0',
  save_every='1',
)


def program(config: Config, devices: int = 0) -> str:
  """Return the text of the lowered training step, on a mesh if `devices` is not 0."""
  step, state, batch = traced_step(config, devices)
  return jax.jit(step).lower(state, batch).as_text()


def jaxpr(config: Config) -> str:
  """Return the text of the traced step. A TPU kernel can be traced, but not lowered, on a CPU."""
  step, state, batch = traced_step(config)
  return str(jax.make_jaxpr(step)(state, batch))


def traced_step(config: Config, devices: int = 0) -> tuple[Callable, dict, dict]:
  """Return the training step, and the shapes of its state and of a batch."""
  task, optim = make_task(config), config.optim
  model, lr = task.build(10), make_lr_schedule(optim, steps=4, epoch=2.0)
  tx = make_optimizer(optim, lr, abstract_params(model, config.data.size))
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    lr=lr,
    loss=task.loss,
    seed=config.seed,
    mixup_alpha=config.mixup,
    accumulate=optim.grad_accum_steps,
    ema=optim.ema,
    skip_spikes=optim.skip_spikes,
    mesh=make_mesh(1, batches={}, devices=jax.devices()[:devices]) if devices else None,
    grad_dtype=optim.grad_dtype,
  )
  init = functools.partial(init_state, model=model, tx=tx, size=config.data.size, ema=optim.ema > 0)
  batch = {
    'image': jax.ShapeDtypeStruct((config.data.batch, *config.data.size, 3), np.uint8),
    'label': jax.ShapeDtypeStruct((config.data.batch, 1), np.int32),
    'mask': jax.ShapeDtypeStruct((config.data.batch,), bool),
  }
  return step, jax.eval_shape(init, 0), batch


def forward(config: Config) -> str:
  """Return the text of the lowered forward pass of training."""
  model = make_task(config).build(10)
  params = abstract_params(model, config.data.size)
  image = jax.ShapeDtypeStruct((2, *config.data.size, 3), np.uint8)
  key = jax.eval_shape(lambda: jax.random.key(0))
  apply = lambda params, image, key: model.apply(
    {'params': params}, image, train=True, rngs={'dropout': key}
  )
  return jax.jit(apply).lower(params, image, key).as_text()


def initialization(config: Config) -> str:
  """Return the text of the lowered initialization of the model."""
  model = make_task(config).build(10)
  image = jax.ShapeDtypeStruct((1, *config.data.size, 3), np.uint8)
  return jax.jit(model.init).lower(jax.eval_shape(lambda: jax.random.key(0)), image).as_text()


def initial_params(config: Config) -> list[bytes]:
  """Return the parameters that a run of the config starts with."""
  model, mesh = make_task(config).build(10), make_mesh(1, batches={})
  tx = make_optimizer(config.optim, lambda step: 0.1, abstract_params(model, config.data.size))
  with tempfile.TemporaryDirectory() as workdir:
    checkpoints = CheckpointManager(Path(workdir), keep=1, keep_every=0)
    state = restore_or_init_state(config, checkpoints, model=model, tx=tx, mesh=mesh)[0]
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]


def shardings(config: Config) -> str:
  """Return how the parameters are split over 8 devices."""
  shapes = abstract_params(make_task(config).build(10), config.data.size)
  return str(state_shardings(shapes, make_mesh(config.mesh.fsdp, batches={})))


def optimizer(config: Config) -> str:
  """Return the text of the lowered update of a few parameters, one of them a running statistic."""
  kernel = jnp.ones((40, 40))
  params = {
    'Transformer': {'encoderblock': {'kernel': jnp.ones((2, 4, 4))}},
    'head': {'kernel': kernel},
    'norm': {'running_mean': jnp.ones(4), 'scale': jnp.ones(4)},
  }
  tx = make_optimizer(config.optim, lambda step: 0.1, params)
  extra = {'step': 0, 'loss': jnp.float32(0), 'grad_norm': jnp.float32(1)}
  update = lambda grads, state, params: tx.update(grads, state, params, **extra)
  return jax.jit(update).lower(params, tx.init(params), params).as_text()


def schedule(config: Config) -> list[float]:
  """Return the learning rates of a run of 20 steps of 5 steps an epoch."""
  lr = make_lr_schedule(config.optim, steps=20, epoch=5.0)
  return [float(lr(step)) for step in range(21)]


def length(config: Config) -> int:
  """Return the number of steps of a run on 64 examples."""
  return total_steps(config, 64)


def batches(config: Config, *, evaluation: bool = False) -> list | str:
  """Return two training batches, or all batches of an evaluation, or the text of an error."""
  try:
    train_source, eval_source = open_sources(config)
    kwargs = {'host': 0, 'hosts': 1}
    if evaluation:
      made = eval_batches(eval_source, config.data, **kwargs)
    else:
      made = train_batches(train_source, config.data, seed=config.seed, start=0, **kwargs)
    taken = [*itertools.islice(made, None if evaluation else 2)]
    made.close()
  except UserError as error:
    return str(error)
  return [(name, array.shape, array.tobytes()) for batch in taken for name, array in batch.items()]


def loader(config: Config) -> tuple[int, int]:
  """Return the numbers of worker processes and of decoding threads while batches are made."""
  made = train_batches(open_sources(config)[0], config.data, seed=0, start=0, host=0, hosts=1)
  before = decoding_threads()
  next(made)
  counts = len(multiprocessing.active_children()), len(decoding_threads() - before)
  made.close()
  return counts


def decoding_threads() -> set[int | None]:
  return {thread.ident for thread in threading.enumerate() if thread.name.startswith('decode')}


def run(config: Config, workdir: Path) -> dict[str, object]:
  """Train, and return what the run did and left behind."""
  error, decoded, watchdog = '', [], mock.MagicMock(spec=Watchdog)
  write_train_image = images.write_train_image

  def counted(data, out, **kwargs):
    decoded.append(out.shape == (*config.data.size, 3))
    write_train_image(data, out, **kwargs)

  try:
    with mock.patch.object(images, 'write_train_image', counted):
      train(config, workdir, watchdog=watchdog)
  except (UserError, DivergedError) as raised:
    error = str(raised).replace(str(workdir), '')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = lambda key: [record['step'] for record in records if key in record]
  probes = [record for record in records if 'fewshot/digits_5shot' in record]
  return {
    'losses': [record['loss'] for record in records if 'loss' in record],
    'train records': steps('loss'),
    'test records': steps('test_loss'),
    'probe records': [record['step'] for record in probes],
    'last probe': [value for name, value in probes[-1].items() if 'shot' in name] if probes else [],
    'ids': (workdir / 'ids.jsonl').exists(),
    'checkpoints': sorted(path.name for path in workdir.glob('checkpoints/*')),
    'seconds': {arg for call in watchdog.mock_calls for arg in call.args if type(arg) is float},
    'many batches decoded': sum(decoded) > 30 * config.data.batch,
    'error': error,
  }


def bad_images(config: Config) -> int:
  """Return how many of 20 examples may be unreadable."""
  return max_bad_examples(config.data, 20)
