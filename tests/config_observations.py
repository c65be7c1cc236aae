"""Observe what a config changes: programs, batches, schedules, results of short runs."""

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
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.images import write_train_image
from vit_jax.data.loader import eval_batches, max_bad_examples, train_batches
from vit_jax.data.sources import open_source
from vit_jax.errors import DivergedError, UserError
from vit_jax.optim.durations import total_steps
from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.train import train
from vit_jax.training.initial_state import restore_or_init_state
from vit_jax.training.program import (
  Program,
  abstract_state,
  compile_train_step,
  make_init_fn,
  make_program,
)
from vit_jax.training.setup import open_sources, weight_task
from vit_jax.training.task import make_task
from vit_jax.training.teacher import describe_teacher

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


def program(config: Config) -> str:
  """Return the text of the train step as it is lowered for 2 devices."""
  with mock.patch.object(jax.stages.Lowered, 'compile', lambda lowered, options: lowered):
    return compile_train_step(tiny_program(config)).as_text()


def tiny_program(config: Config) -> Program:
  task = make_task(config)
  if config.class_weights != 'none':
    task = weight_task(task, open_source('builtin:digits', 'train'), config)
  return make_program(
    config,
    task,
    examples=64,
    classes=10,
    label_slots=1,
    devices=jax.devices()[: 2 * config.mesh.fsdp],
    teacher=describe_teacher(config, 10),
  )


def forward(config: Config) -> str:
  """Return the text of the lowered forward pass of training."""
  return jax.jit(apply_model(config)).lower(*apply_args(config)).as_text()


def jaxpr(config: Config) -> str:
  """Return the text of the traced forward pass. A CPU can trace TPU kernels, but not lower them."""
  return str(jax.make_jaxpr(apply_model(config))(*apply_args(config)))


def apply_model(config: Config) -> Callable:
  model = tiny_program(config).model
  return lambda params, images, key: model.apply(
    {'params': params}, images, train=True, rngs={'dropout': key}
  )


def apply_args(config: Config) -> tuple:
  images = jax.ShapeDtypeStruct((2, *config.data.size, 3), np.uint8)
  return tiny_program(config).param_shapes, images, jax.eval_shape(lambda: jax.random.key(0))


def initialization(config: Config) -> str:
  """Return the text of the lowered initialization of the train state."""
  return jax.jit(make_init_fn(tiny_program(config))).lower(0).as_text()


def initial_params(config: Config) -> list[bytes]:
  """Return the parameters that a run of the config starts with."""
  with tempfile.TemporaryDirectory() as workdir:
    checkpoints = CheckpointManager(Path(workdir), max_to_keep=1, keep_every=0)
    state = restore_or_init_state(tiny_program(config), checkpoints)[0]
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]


def shardings(config: Config) -> str:
  """Return how the train state is split over devices."""
  return str(jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(tiny_program(config))))


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
  """Train, and return the results and files of the run."""
  error, decoded, watchdog, tracked = '', [], mock.MagicMock(spec=Watchdog), mock.MagicMock()

  def counted(data, out, **kwargs):
    decoded.append(out.shape == (*config.data.size, 3))
    write_train_image(data, out, **kwargs)

  try:
    with (
      mock.patch('vit_jax.data.loader.write_train_image', counted),
      mock.patch('vit_jax.training.setup.check_trackers'),
      mock.patch.dict('vit_jax.metrics.trackers.TRACKERS', mlflow=tracked),
    ):
      train(config, workdir, watchdog=watchdog)
  except (UserError, DivergedError) as raised:
    error = str(raised).replace(str(workdir), '')
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
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
    'tracked': tracked.called,
    'traces': [path.name for path in workdir.glob('tensorboard/plugins/profile/*')],
    'checkpoints': sorted(path.name for path in workdir.glob('checkpoints/*')),
    'seconds': {arg for call in watchdog.mock_calls for arg in call.kwargs.values()},
    'many batches decoded': sum(decoded) > 30 * config.data.batch,
    'error': error,
  }


def bad_images(config: Config) -> int:
  """Return how many of 20 examples may be unreadable."""
  return max_bad_examples(config.data, 20)
