"""Masked patch prediction in the training loop.

It does not depend on the devices, resumes bit for bit, counts every example once, and its models
can be fine-tuned.
"""

import dataclasses
import functools
import shutil
from types import SimpleNamespace

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

import vit_jax
from vit_jax.checkpoint.manager import CheckpointManager, load_newest_params
from vit_jax.config import Config, DataConfig, MaskConfig, ModelConfig, OptimConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.outputs import masked_patches, mean_masked_patch_metrics
from vit_jax.metrics.records import read_metrics
from vit_jax.models.masked import build_masked_vit
from vit_jax.optim.losses import color_loss, pixel_loss
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated, to_global
from vit_jax.step import init_state, train_step
from vit_jax.train import train
from vit_jax.training.initial_state import restore_or_init_state
from vit_jax.training.program import make_program
from vit_jax.training.task import make_task

# It uses every random draw.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=48, size=(8, 8)),
  model=ModelConfig(variant='mu/2', depth=2, dropout=0.1, drop_path=0.1),
  optim=OptimConfig(lr=1e-2, warmup='2', weight_decay=0.1, grad_clip_norm=1.0, grad_accum_steps=2),
  mask=MaskConfig(target='colour'),
  steps=6,
  log_every='1',
  eval_every='0',
  probes=('knn:builtin:digits',),
  save_every='3',
)


def test_losses_are_numpys_means_over_the_patches_of_an_image():
  rng = np.random.default_rng(0)
  logits, actual = rng.normal(size=(3, 5, 2, 512)), rng.integers(0, 512, (3, 5, 2))
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -np.log(np.take_along_axis(probabilities, actual[..., None], -1)[..., 0]).mean(
    axis=(1, 2)
  )
  np.testing.assert_allclose(
    color_loss((logits.astype(np.float32), actual), None), expected, rtol=1e-6
  )
  said, true = rng.normal(size=(2, 3, 5, 7))
  np.testing.assert_allclose(
    pixel_loss((said, true), None), ((said - true) ** 2).mean(axis=(1, 2)), rtol=1e-6
  )


def evaluate_masked(outputs, loss, mask: list[bool]) -> dict[str, float]:
  """Return the metrics of a model with these outputs."""
  model = SimpleNamespace(apply=lambda variables, images: outputs)
  rows = masked_patches(loss).apply(model, {}, {'image': None, 'label': None})
  return mean_masked_patch_metrics(jax.device_get(rows) | {'mask': np.array(mask)})


def test_masked_metrics_are_over_readable_examples():
  """Multiples of 3 are wrong: 3 of the 8 patches of examples 0 and 2, and 4 of all 12."""
  actual = np.arange(12).reshape(3, 4, 1)
  logits = np.eye(512, dtype=np.float32)[np.where(actual % 3, actual, 500)]
  metrics = evaluate_masked((logits, actual), color_loss, [True, False, True])
  assert (metrics['masked_accuracy'], metrics['examples']) == (5 / 8, 2)
  metrics = evaluate_masked((logits, actual), color_loss, [True, True, True])
  assert (metrics['masked_accuracy'], metrics['examples']) == (8 / 12, 3)
  values = np.zeros((3, 4, 2)), np.ones((3, 4, 2))
  assert evaluate_masked(values, pixel_loss, [True, False, True]) == {'loss': 1.0, 'examples': 2}


def test_eight_devices_equal_one():
  """Losses and parameters agree to 1e-5 over both axes, in parts, with registers and remat."""
  model = ModelConfig(
    variant='mu/2', depth=2, width=256, heads=4, dropout=0.1, registers=2, remat='vit'
  )
  config = dataclasses.replace(CONFIG, model=model)
  task, tx, batch = make_task(config), optax.sgd(1e-1), next(digits())
  step = functools.partial(
    train_step,
    model=task.build_model(10),
    tx=tx,
    loss=task.loss,
    lr=lambda step: 0.1,
    seed=3,
    grad_accum_steps=2,
  )
  begin = functools.partial(
    init_state, 0, model=task.build_model(10), tx=tx, size=(8, 8), ema=False
  )

  def run(fsdp, devices):
    mesh, losses = make_mesh(fsdp, batches={}, devices=devices), []
    shardings = state_shardings(jax.eval_shape(begin), mesh)
    state = jax.jit(begin, out_shardings=shardings)()
    update = jax.jit(
      functools.partial(step, mesh=mesh), out_shardings=(shardings, replicated(mesh))
    )
    for _ in range(4):
      state, metrics = update(state, to_global(batch, mesh))
      losses.append(float(metrics['loss']))
    return losses, jax.device_get(state.params)

  (losses, params), (expected, reference) = run(2, jax.devices()), run(1, jax.devices()[:1])
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, reference
  )
  assert (
    losses[0] == pytest.approx(np.log(512), rel=1e-5) and losses[-1] < losses[0]
  )  # The head starts at zero.


def digits():
  """Return batches of real digits."""
  source = open_source('builtin:digits', 'train')
  for batch in eval_batches(
    source, dataclasses.replace(CONFIG.data, eval_batch=16), host=0, hosts=1
  ):
    yield {name: batch[name] for name in ('image', 'label', 'mask')}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Return (directory, last evaluation) of a run."""
  workdir = tmp_path_factory.mktemp('masked') / 'run'
  return workdir, train(CONFIG, workdir)


def flat(workdir):
  return flax.traverse_util.flatten_dict(load_newest_params(workdir)[0], sep='/')


def test_a_stopped_run_ends_bit_for_bit_the_same_and_the_evaluation_batch_does_not_matter(
  run, tmp_path
):
  full, result = run
  shutil.copytree(full, tmp_path / 'run', ignore=shutil.ignore_patterns('6', 'metrics.jsonl'))
  data = dataclasses.replace(CONFIG.data, eval_batch=200)
  other = train(dataclasses.replace(CONFIG, data=data), tmp_path / 'run')
  assert {name: leaf.tobytes() for name, leaf in flat(full).items()} == {
    name: leaf.tobytes() for name, leaf in flat(tmp_path / 'run').items()
  }
  losses = lambda workdir: [record['loss'] for record in read_metrics(workdir) if 'loss' in record]
  assert losses(tmp_path / 'run') == losses(full)[3:]
  assert (
    other['test_masked_accuracy'] == result['test_masked_accuracy']
    and other['test_examples'] == 500
  )
  assert other['test_loss'] == pytest.approx(result['test_loss'], rel=1e-6)


def test_evaluation_has_the_models_prediction_for_every_example_once(run):
  (batch,) = eval_batches(
    open_source('builtin:digits', 'test'),
    dataclasses.replace(CONFIG.data, eval_batch=500),
    host=0,
    hosts=1,
  )
  logits, actual = jax.device_get(
    jax.jit(build_masked_vit(CONFIG).apply)(
      {'params': load_newest_params(run[0])[0]}, batch['image']
    )
  )
  assert run[1]['test_masked_accuracy'] == np.mean(logits.argmax(-1) == actual)
  normal = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  np.testing.assert_allclose(
    run[1]['test_loss'], -np.take_along_axis(normal, actual[..., None], -1).mean(), rtol=1e-5
  )
  assert any('knn/digits_20nn' in record for record in read_metrics(run[0]))


def test_fine_tuning_takes_all_parameters_but_those_of_the_head_and_the_masking(run, tmp_path):
  model = vit_jax.load(str(run[0]))
  assert model.classes == 0 and model.labels == () and 'it has no head' in model.notes[0]
  config = dataclasses.replace(CONFIG, mask=MaskConfig(), init=str(run[0]))
  checkpoints = CheckpointManager(tmp_path)
  program = make_program(config, make_task(config), examples=1297, classes=10, label_slots=1)
  state, _, notes = restore_or_init_state(program, checkpoints)
  checkpoints.close()
  new, old = flax.traverse_util.flatten_dict(jax.device_get(state.params), sep='/'), flat(run[0])
  assert old.keys() - new.keys() == {'mask', 'patch_head/kernel', 'patch_head/bias'}
  assert new.keys() - old.keys() == {'head/kernel', 'head/bias'}
  assert all(np.array_equal(new[name], old[name]) for name in new.keys() & old.keys())
  assert [note.split()[:2] for note in notes if note.startswith('head/')] == [
    ['head/bias', 'new'],
    ['head/kernel', 'new'],
  ]


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'probes': ('real',)}, "config.probes: 'real'"),
    ({'mixup': 0.1}, r'config\.mixup=0\.1'),
    ({'loss': 'sigmoid'}, r"config\.loss='sigmoid'"),
    ({'mask': MaskConfig(rate=0.2)}, r'config\.mask\.rate=0\.2'),
  ],
)
def test_incompatible_settings_are_an_error_before_anything_is_written(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    train(dataclasses.replace(CONFIG, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
