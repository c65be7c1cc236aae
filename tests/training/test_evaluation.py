"""One checkpoint has one number: what training prints is what `vit-jax evaluate` prints."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax.cli.arguments import eval_batch_size
from vit_jax.config import Config, DataConfig, MaskConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source
from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.metrics.records import read_metrics
from vit_jax.models.families import build_model
from vit_jax.sharding.mesh import make_mesh, replicated
from vit_jax.train import train
from vit_jax.training.evaluation import make_evaluator
from vit_jax.training.task import make_task

# 500 test images are not a multiple of 48. Resizing from 8 to 12 pixels gives fractional pixels, so
# that rounding them would show. The MLP is large enough to be sharded.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=48, size=(12, 12)),
  model=ModelConfig(variant='mu/4', depth=2, width=64, mlp=1024),
  optim=OptimConfig(lr=1e-2, ema=0.5),
  steps=6,
  eval_every='3',
  save_every='0',
)


@pytest.fixture(scope='module', params=[1, 4], ids=['copies', 'shards'])
def run(request, tmp_path_factory):
  """Return (directory, metrics of training) of a run on eight devices."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=request.param))
  return workdir, train(config, workdir)


def evaluate(typed, workdir, *flags) -> tuple[dict, str]:
  """Return the JSON and the text of `vit-jax evaluate` on a run."""
  path = workdir.parent / 'evaluation.json'
  arguments = ('--init', str(workdir), '--data', 'builtin:digits', '--json', str(path))
  code, out, err = typed('evaluate', *arguments, *flags)
  assert code == 0, err
  return json.loads(path.read_text(encoding='utf-8')), out


def test_training_and_evaluate_give_the_same_number_to_the_last_digit(run, typed):
  workdir, printed = run
  result, text = evaluate(typed, workdir)
  names = ('accuracy', 'accuracy_top5', 'loss', 'examples')
  assert {name: result[name] for name in names} == {name: printed[f'test_{name}'] for name in names}
  assert result['examples'] == 500
  assert f'loss      {printed["test_loss"]:8.4f}\n' in text
  (record,) = [
    each for each in read_metrics(workdir) if each.get('step') == 6 and 'test_loss' in each
  ]
  assert {name: record[f'test_{name}'] for name in names} == {name: result[name] for name in names}


def test_a_run_is_evaluated_in_batches_of_the_run(run):
  arguments = SimpleNamespace(batch=None, init=str(run[0]))
  assert eval_batch_size(arguments) == 48
  assert eval_batch_size(SimpleNamespace(batch=7, init=str(run[0]))) == 7
  assert eval_batch_size(SimpleNamespace(batch=None, init='B_16')) == 16  # On a CPU.


def test_the_number_does_not_depend_on_the_batch(run, typed):
  workdir, printed = run
  result, _ = evaluate(typed, workdir, '--batch', '104')
  assert result['accuracy'] == printed['test_accuracy']
  assert result['loss'] == pytest.approx(printed['test_loss'], rel=1e-6)


def test_the_number_is_that_of_numpy_in_float64(run):
  """The model predicts each image alone: there are no batches and no sums on a device."""
  workdir, printed = run
  model, source = vit_jax.load(str(workdir)), open_source('builtin:digits', 'test')
  data = eval_data_config(model, batch=len(source))
  (batch,) = eval_batches(source, data, host=0, hosts=1, exact=True)
  labels = np.array([source[i][1][0] for i in range(len(source))])
  logits = np.asarray(model.logits(batch['image']), np.float64)
  order = np.argsort(-logits, axis=1, kind='stable')
  log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  losses = -log_probabilities[np.arange(len(labels)), labels]
  assert printed['test_accuracy'] == np.mean(order[:, 0] == labels)
  assert printed['test_accuracy_top5'] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
  assert printed['test_loss'] == pytest.approx(losses.mean(), rel=1e-5)


def test_rounded_images_would_give_another_number(run):
  """This guards the tests above: their images have fractions."""
  workdir, printed = run
  model, source = vit_jax.load(str(workdir)), open_source('builtin:digits', 'test')
  data = eval_data_config(model, batch=len(source))
  (batch,) = eval_batches(source, data, host=0, hosts=1)
  logits = np.asarray(model.logits(batch['image']), np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  losses = -np.take_along_axis(log_probabilities, batch['label'], axis=1)
  assert printed['test_loss'] != pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize('target', ['colour', 'pixels'])
def test_masked_patches_are_evaluated_on_uint8_images(target):
  """The masked patches follow from the sum of the pixels, and the colours from their bits."""
  data = dataclasses.replace(CONFIG.data, eval_batch=96)
  task = make_task(dataclasses.replace(CONFIG, data=data, mask=MaskConfig(target=target)))
  model, source = task.build_model(0), open_source('builtin:digits', 'test')
  (batch,) = eval_batches(
    source, dataclasses.replace(data, eval_batch=len(source)), host=0, hosts=1
  )
  assert batch['image'].dtype == np.uint8
  params = model.init(jax.random.key(0), batch['image'][:1])['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(np.float32), params
  )
  if target == 'colour':  # Predict the most common colour, so that some predictions are correct.
    _, actual = model.apply({'params': params}, batch['image'])
    params['patch_head']['bias'] = (
      params['patch_head']['bias'].at[np.bincount(actual.ravel()).argmax()].add(9)
    )
  predicted, actual = (np.asarray(x) for x in model.apply({'params': params}, batch['image']))

  mesh = make_mesh(1, batches={})
  evaluator = Evaluator(model=model, param_shapes=params, mesh=mesh, data=data)
  rows = evaluator.rows(jax.device_put(params, replicated(mesh)), source, task.eval_output)
  metrics = task.aggregate_metrics(rows)
  assert metrics['examples'] == 500
  predicted = predicted.astype(np.float64)
  if target == 'pixels':
    assert metrics['loss'] == pytest.approx(np.mean((predicted - actual) ** 2), rel=1e-5)
  else:
    chosen = np.take_along_axis(predicted, actual[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(predicted).sum(axis=-1)) - chosen
    assert metrics['loss'] == pytest.approx(losses.mean(), rel=1e-5)
    accuracy = np.mean(predicted.argmax(axis=-1) == actual)
    assert metrics['masked_accuracy'] == pytest.approx(accuracy, abs=1e-3)
    assert accuracy > 0


def test_evaluations_of_a_run_pad_with_the_mean_of_its_model():
  config = validate(
    dataclasses.replace(
      CONFIG,
      data=dataclasses.replace(CONFIG.data, eval_crop='border', eval_short_side=6),
      model=dataclasses.replace(CONFIG.model, mean=(10.0, 20.0, 30.0)),
    )
  )
  program = SimpleNamespace(eval_param_shapes={}, mesh=make_mesh(1, batches={}))
  model, run = build_model(config.model, 10), SimpleNamespace(config=config, program=program)
  evaluator = make_evaluator(run, model, lambda rows: False)
  source, output = open_source('builtin:digits', 'test[:16]'), SimpleNamespace(exact_images=True)
  batch = next(evaluator._load(source, output, host=0, hosts=1))
  np.testing.assert_array_equal(batch['image'][0, 0, 0], [10, 20, 30])
