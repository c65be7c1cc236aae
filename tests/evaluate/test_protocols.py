"""Evaluations by their names: what config.probes means, and the figures in a run and of a finished model."""

import dataclasses

import numpy as np
import pytest

import vit_jax
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import probes, protocols
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.fewshot import predict_ridge, shuffle_by_class
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.metrics.records import read_metrics
from vit_jax.train import train

ENTRIES = ('fewshot:builtin:digits', 'knn:builtin:digits')
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=96, size=(8, 8)),
  model=ModelConfig(variant='mu/4', depth=2),
  optim=OptimConfig(lr=1e-2),
  steps=4,
  eval_every='0',
  save_every='0',
  probes=ENTRIES,
  probe_every='2',
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that was evaluated after steps 2 and 4."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  return workdir, train(CONFIG, workdir)


def test_a_run_evaluates_on_a_clock_of_its_own_what_the_finished_model_gives(run):
  workdir, last = run
  records = [
    record
    for record in read_metrics(workdir)
    if any(name.startswith('fewshot/') for name in record)
  ]
  names = [f'fewshot/digits_{count}shot' for count in (1, 5, 10, 25)] + ['knn/digits_20nn']
  assert [(record['step'], [name for name in record if '/' in name]) for record in records] == [
    (2, names),
    (4, names),
  ]
  assert 'test_accuracy' in last  # The last evaluation is still that of the head.

  model = vit_jax.load(str(workdir))
  subject, params = make_pretrained_evaluator(model, eval_data_config(model, batch=96))
  outcomes = protocols.make_protocols(ENTRIES, model.labels, dir='', l2=1024.0)(subject, params)
  assert protocols.results_to_metrics(outcomes) == {
    name: pytest.approx(records[1][name], abs=2e-3) for name in names
  }
  assert [(each.protocol, each.pool, each.examples) for each in outcomes] == [
    ('fewshot', 1297, 500),
    ('knn', 1297, 500),
  ]


def test_the_figures_are_those_of_the_models_own_features(run):
  model = vit_jax.load(str(run[0]))
  x, y, x_test, y_test = [], [], [], []
  for split, features, labels in (('train', x, y), ('test', x_test, y_test)):
    source = open_source('builtin:digits', split)
    images = np.stack([source[i][0] for i in range(len(source))])
    features.append(np.asarray(model.features(np.repeat(images[..., None], 3, axis=-1))))
    labels.append(np.array([source[i][1][0] for i in range(len(source))]))
  (x,), (y,), (x_test,), (y_test,) = x, y, x_test, y_test
  expected = []
  for seed in range(3):
    chosen = np.concatenate([each[:5] for each in shuffle_by_class(y, 10, seed)])
    expected.append(np.mean(predict_ridge(x[chosen], y[chosen], x_test, classes=10) == y_test))
  subject, params = make_pretrained_evaluator(model, eval_data_config(model, batch=50))
  pool, test = probes.open_pool_and_test('builtin:digits')
  options = probes.ProbeOptions(shots=(5,))
  (outcome,) = protocols.make_probe_protocol(['fewshot'], 'builtin:digits', pool, test, options)(
    subject, params
  )
  assert outcome.figures['5shot'].accuracy == pytest.approx(np.mean(expected), abs=2e-3)
  assert outcome.figures['5shot'].std == pytest.approx(np.std(expected, ddof=1), abs=2e-3)


def test_a_record_is_named_by_the_protocol_and_the_last_of_the_source():
  names = [
    ('fewshot', 'tfds:cifar10:3.0.2'),
    ('knn', 'folder:/data/photos/'),
    ('v2', ''),
    ('linear', 'builtin:digits'),
  ]
  expected = ['fewshot/cifar10', 'knn/photos', 'v2/matched-frequency', 'linear/digits']
  assert [protocols.metric_prefix(*each) for each in names] == expected


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    (['fewshots:builtin:digits'], "names no protocol. Did you mean 'fewshot'"),
    (['fewshot'], 'names no data: expected fewshot:SOURCE'),
    (['knn:builtin:digit'], "'digit' is unknown. Did you mean 'digits'"),
    (['knn:folder:a/x', 'knn:folder:b/x'], 'several would be recorded as knn/x'),
    (['real'], 'imagenet2012'),
  ],
)
def test_what_cannot_be_evaluated_is_an_error_before_a_run_writes_anything(
  tmp_path, entries, message
):
  config = dataclasses.replace(
    CONFIG, probes=tuple(entries), data=dataclasses.replace(CONFIG.data, dir=str(tmp_path / 'none'))
  )
  with pytest.raises(UserError, match=message):
    train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_several_labels_an_image_are_refused(tmp_path, photos):
  (tmp_path / 'two.csv').write_text(
    f'path,label\n{photos}/val/cat/00.png,cat;dog\n{photos}/val/cat/05.png,dog\n'
  )
  with pytest.raises(UserError, match='have up to 2 labels'):
    probes.open_pool_and_test(f'csv:{tmp_path / "two.csv"}', split='all', test_split='all')


def test_the_split_that_is_learned_from_is_the_papers():
  assert probes.PROBE_SPLITS['tfds:imagenet2012'] == ('train[:65000]', 'validation')
