"""The loop: a config and a directory in, a trained model out. Pre-training and fine-tuning are this one function."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import sync_global_devices as wait_for_all

from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.checkpoint.run_directory import describe, refuse_other_run
from vit_jax.config import Config, due, duration, labelled, total_steps, validate
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.loader import eval_batches, most_bad, train_batches
from vit_jax.data.sources import Source
from vit_jax.errors import DivergedError, UserError
from vit_jax.evaluate.protocols import examiner, open_all
from vit_jax.evaluate.subject import Subject
from vit_jax.metrics.step_log import Ledger, open_ledger
from vit_jax.metrics.writer import (
  Metrics,
  Stopwatch,
  at_steps,
  draw_curves,
  evaluations,
  examinations,
  in_words,
)
from vit_jax.optim.optimizer import optimizer, schedule
from vit_jax.pulse import Pulse
from vit_jax.runtime.crash_log import Failures
from vit_jax.runtime.preemption import Stopping
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.sharding.fsdp import sums_over_devices
from vit_jax.sharding.mesh import (
  Mesh,
  any_host,
  compiler_options,
  describe_mesh,
  everywhere,
  make_mesh,
  peak_flops,
  rows,
  state_shardings,
  state_specs,
  to_global,
  undivided,
)
from vit_jax.step import TrainState, abstract_params, predict_from_shares, train_step
from vit_jax.training.setup import first_state, open_sources
from vit_jax.training.task import task_of

CLOCKS = ('log_every', 'eval_every', 'evals_every', 'save_every', 'keep_every')


def train(
  config: Config, workdir: Path, *, stopping: Stopping | None = None, watchdog: Watchdog | None = None
) -> dict[str, float]:
  """Trains to the end, going on from what `workdir` holds, and returns the last evaluation.

  UserError, before anything is written, where the config, the data and the directory do not go together. Where `stopping` is
  told so, it saves and exits with that one's exit code.
  """
  began = time.monotonic()
  config = validate(config)
  stopping, watchdog = stopping or Stopping(), watchdog or Watchdog()
  pulse = Pulse(stopping, watchdog, quick=config.step_timeout, slow=config.first_step_timeout)
  task = task_of(config)
  train_source, eval_source = open_sources(config)
  judge = open_all(config.evals, train_source.label_names, dir=config.data.dir, l2=config.fewshot_l2)
  steps, epoch = total_steps(config, examples := len(train_source.labelled)), examples / labelled(config.data)
  every = {name: duration(getattr(config, name), name=name, steps=steps, epoch=epoch) for name in CLOCKS}
  facts = fingerprint(train_source, eval_source)
  refuse_other_run(workdir, config, train_source.label_names, facts)

  model = task.build(train_source.classes)
  lr = schedule(config.optim, steps=steps, epoch=epoch)
  tx = optimizer(config.optim, lr, abstract_params(model, config.data.size))
  mesh = make_mesh(config.mesh.fsdp, batches=batch_sizes(config))
  failures = Failures(workdir, host=jax.process_index())
  watchdog.record = failures.record
  with failures.recorded():
    checkpoints = Checkpoints(workdir, keep=config.keep, keep_every=every['keep_every'])
    state, notes = first_state(config, checkpoints, model=model, tx=tx, mesh=mesh)
    first = int(state.step)
    failures.begin(first)
    done = {'eval_every': evaluations(workdir), 'evals_every': examinations(workdir)}
    owed = [name for name in done if first and due(first, every[name], steps) and first not in at_steps(done[name])]
    wait_for_all('restored')  # Before anybody writes: all of them have to go on from the same checkpoint.
    describe(workdir, config, train_source.label_names, facts)
    checkpoints.open()
    metrics = Metrics(workdir, step=first, steps=steps, write=jax.process_index() == 0)
    metrics.say(f'{workdir}: {summary(config, model, state)}, {describe_mesh(mesh)}, steps {first} to {steps}')
    for note in [*notes, *undivided(state.params, mesh)]:
      metrics.say(f'  {note}')

    batches = train_batches(train_source, config.data, seed=config.seed, start=first, **hosts())
    batches = prefetch(batches, config.data.prefetch, mesh)
    ledger = open_ledger(config, workdir, metrics, train_source, step=first)
    update = compiled_step(config, model=model, tx=tx, lr=lr, mesh=mesh, state=state, labels=train_source.most_labels)
    update = functools.partial(update, seed=np.int32(config.seed))
    shapes = abstract_params(model, config.data.size)
    alive = {'asked': pulse.asked, 'progress': lambda images: pulse.pause()}
    subject = Subject(model=task.judged(train_source.classes), shapes=shapes, mesh=mesh, data=config.data, **alive)
    metrics.say(f'  ready to step after {time.monotonic() - began:.0f} s')
    stopping.begin(any_host(mesh))
    state, stopped = loop(
      state,
      batches,
      range(first + 1, steps + 1),
      every=every,
      owed=owed,
      update=update,
      evaluate={
        'eval_every': evaluator(config, eval_source, model=model, mesh=mesh, state=state, asked=pulse.asked),
        'evals_every': examiner(judge, subject),
      },
      speed=functools.partial(speed, config, model, mesh),
      checkpoints=checkpoints,
      ledger=ledger,
      metrics=metrics,
      pulse=pulse,
    )
    pulse.pause()
    ledger.settle()
    checkpoints.finish(state, int(state.step))
    if stopped:
      metrics.say(f'stopped and saved after step {int(state.step)}/{steps}: the same command goes on from there')
    metrics.close()
    if ledger.hopeless:
      raise DivergedError(ledger.hopeless)
  if stopped:
    raise SystemExit(stopping.exit_code)
  stopping.end()
  return close(workdir, metrics, seconds=time.monotonic() - began)


def loop(
  state: TrainState,
  batches: Iterator[tuple[np.ndarray, dict[str, jax.Array]]],
  steps: range,
  *,
  every: dict[str, int],
  owed: list[str],
  update: Callable,
  evaluate: dict[str, Callable[[dict], dict[str, float] | None]],
  speed: Callable[[float], dict[str, float]],
  checkpoints: Checkpoints,
  ledger: Ledger,
  metrics: Metrics,
  pulse: Pulse,
) -> tuple[TrainState, bool]:
  """Takes the steps; the last state, and whether it was told to stop. `owed`: clocks of evaluations that were left out."""
  watch, last = Stopwatch(), steps.stop - 1

  def evaluated(name: str, step: int) -> bool:
    pulse.pause()
    with watch.paused(state):
      result = evaluate[name](state.best)
    if result:
      metrics.record(step, result)
      metrics.say(f'step {step}/{last}  ' + in_words(result))
    return result is not None

  if not all(evaluated(name, steps.start - 1) for name in owed):
    return state, True
  for step, (ids, batch) in zip(steps, batches, strict=False):
    checkpoints.check()
    state, values = update(state, batch)
    ledger.add(step, values, ids)
    stop = pulse.asked(values)
    if due(step, every['log_every'], step if stop else last):
      ledger.settle()
      values = speed(watch.lap() / ledger.steps)
      values = ledger.record() | values
      metrics.record(step, values)
      metrics.progress(step, values)
    for name in evaluate:
      stop = stop or (due(step, every[name], last) and not evaluated(name, step))
    if due(step, every['save_every'], last) and not stop:
      pulse.pause()
      with watch.paused(state):
        ledger.settle()
        checkpoints.save(state, step)
    if stop or ledger.hopeless:
      return state, stop
  return state, False


def batch_sizes(config: Config) -> dict[str, int]:
  """The sizes that must divide over the devices, by the name of their setting."""
  part = 'config.data.batch' + (' / config.optim.accumulate' if config.optim.accumulate > 1 else '')
  sizes = {part: config.data.batch // config.optim.accumulate}
  return sizes | ({'config.data.eval_batch': config.data.eval_batch} if config.data.eval_batch else {})


def hosts() -> dict[str, int]:
  """Which of how many hosts this is, as the loader wants it."""
  return {'host': jax.process_index(), 'hosts': jax.process_count()}


def compiled_step(
  config: Config,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  lr: optax.Schedule,
  mesh: Mesh,
  state: TrainState,
  labels: int,
) -> jax.stages.Compiled:
  """`train_step`, of (state, batch, seed=), compiled for this run's shapes, once: a batch of another is an error, not a second
  program. The seed is no constant in it: runs that differ in nothing else share one in the cache."""
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    lr=lr,
    loss=task_of(config).loss,
    mixup_alpha=config.mixup,
    accumulate=config.optim.accumulate,
    ema=config.optim.ema,
    skip_spikes=config.optim.skip_spikes,
    mesh=mesh,
    grad_dtype=config.optim.grad_dtype,
  )
  step.__name__ = 'train_step'  # What profiles and compilation events call it.
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  shardings, b = state_shardings(state, mesh), config.data.batch
  label = np.float32 if config.data.unlabelled else np.int32
  shapes = {'image': ((b, *config.data.size, 3), np.uint8), 'label': ((b, labels), label), 'mask': ((b,), np.bool_)}
  batch = {name: jax.ShapeDtypeStruct(*shape, sharding=rows(mesh)) for name, shape in shapes.items()}
  with jax.set_mesh(mesh):  # Kernels ask it what they are compiled for, and how a batch is split.
    return (
      jax.jit(step, out_shardings=(shardings, everywhere(mesh)), donate_argnums=0)
      .lower(state, batch, seed=np.int32(config.seed))
      .compile(compiler_options(mesh))
    )


def evaluator(
  config: Config, source: Source, *, model: nn.Module, mesh: Mesh, state: TrainState, asked: Callable[[dict], bool]
) -> Callable[[dict], dict[str, float] | None]:
  """Parameters -> {'test_accuracy', …} over the whole evaluation split, whose name comes first; None where `asked`, which is
  given each batch's counts, says to stop."""
  specs, task = state_specs(state.params, mesh), task_of(config)
  from_shares = functools.partial(predict_from_shares, model=model, specs=specs)
  counts = sums_over_devices(functools.partial(task.count, predict=from_shares), mesh, specs)
  counts.__name__ = 'count'
  counts = jax.jit(counts, in_shardings=(state_shardings(state, mesh).params, rows(mesh)), out_shardings=everywhere(mesh))

  def evaluate(params: dict) -> dict[str, float] | None:
    counted = []
    for _, batch in prefetch(eval_batches(source, config.data, **hosts()), config.data.prefetch, mesh):
      with jax.set_mesh(mesh):
        counted.append(counts(params, batch))
      if asked(counted[-1]):
        return None
    result = task.means(counted)
    result |= {'skipped': len(source) - result['examples']} if config.data.bad_images == 'skip' else {}
    if (skipped := result.get('skipped', 0)) > (most := most_bad(config.data, len(source))):
      raise UserError(f'{skipped} images of {source.split} can not be read, and config.data.bad_budget allows {most}')
    return {f'{source.split}_{name}': value for name, value in result.items()}

  return evaluate


def prefetch(
  batches: Iterator[dict[str, np.ndarray]], ahead: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
  """(this host's ids, the batch as global arrays), `ahead` of them on their way to the device before they are asked for."""
  send = lambda batch: (batch['id'], to_global({name: array for name, array in batch.items() if name != 'id'}, mesh))
  queue = deque(map(send, itertools.islice(batches, ahead)))
  while queue:
    yield queue.popleft()
    queue.extend(map(send, itertools.islice(batches, 1)))


def speed(config: Config, model: nn.Module, mesh: Mesh, seconds_per_step: float) -> dict[str, float]:
  """Images and steps, and the share of the chips' peak that the model's own arithmetic takes (a step is three forwards)."""
  values = {'images_per_second': config.data.batch / seconds_per_step, 'seconds_per_step': seconds_per_step}
  if peak := peak_flops(mesh):
    values['mfu'] = 3 * model.shape.flops(config.data.size) * values['images_per_second'] / peak
  return values


def summary(config: Config, model: nn.Module, state: TrainState) -> str:
  """The run in half a line."""
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  size = 'x'.join(map(str, config.data.size))
  return f'{config.model.variant} with {count:,} parameters, {config.data.train} at {size}, batch {config.data.batch}'


def close(workdir: Path, metrics: Metrics, *, seconds: float) -> dict[str, float]:
  """Draws the curves and says how the run ended; the last evaluation."""
  if jax.process_index():
    return {}
  last, curves = evaluations(workdir)[-1], draw_curves(workdir)
  metrics.say(f'done in {seconds:.0f} s: {in_words(last)}; see {curves}')
  return last
