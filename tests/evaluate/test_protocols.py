"""Protocols by name: `config.probes` in a run, and the same protocols on the finished model."""

import dataclasses

import numpy as np
import pytest

import vit_jax
from vit_jax.cli import protocols as cli_protocols
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import label_sets, probes, protocols
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
  """Return a run that was evaluated after steps 2 and 4."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  return workdir, train(CONFIG, workdir)


def test_probes_in_a_run_have_a_schedule_and_agree_with_the_finished_model(run):
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
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=96))
  results = protocols.make_protocols(ENTRIES, model.labels, dir='', l2=1024.0)(evaluator, params)
  assert protocols.results_to_metrics(results) == {
    name: pytest.approx(records[1][name], abs=2e-3) for name in names
  }
  assert [(each.protocol, each.pool_examples, each.examples) for each in results] == [
    ('fewshot', 1297, 500),
    ('knn', 1297, 500),
  ]


def test_fewshot_scores_are_those_of_the_features_of_the_model(run):
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
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=50))
  pool, test = probes.open_pool_and_test('builtin:digits')
  options = probes.ProbeOptions(shots=(5,))
  (result,) = protocols.make_probe_protocol(['fewshot'], 'builtin:digits', pool, test, options)(
    evaluator, params
  )
  assert result.scores['5shot'].accuracy == pytest.approx(np.mean(expected), abs=2e-3)
  assert result.scores['5shot'].std == pytest.approx(np.std(expected, ddof=1), abs=2e-3)


def test_metrics_are_named_by_the_protocol_and_the_end_of_the_source():
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
    (['fewshots:builtin:digits'], "config.probes: 'fewshots.*'fewshot'"),
    (['fewshot'], "config.probes: 'fewshot'"),
    (['knn:builtin:digit'], "'digit'.*'digits'"),
    (['knn:folder:a/x', 'knn:folder:b/x'], 'knn/x'),
    (['real:tfds:imagenet2012'], 'imagenet2012'),
  ],
)
def test_an_invalid_probe_is_an_error_before_a_run_writes_anything(tmp_path, entries, message):
  directory = str(tmp_path / 'none') if 'tfds' in entries[0] else ''
  data = dataclasses.replace(CONFIG.data, dir=directory)
  config = dataclasses.replace(CONFIG, probes=tuple(entries), data=data)
  with pytest.raises(UserError, match=message):
    train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_probes_need_images_with_one_label(tmp_path, photos):
  (tmp_path / 'two.csv').write_text(
    f'path,label\n{photos}/val/cat/00.png,cat;dog\n{photos}/val/cat/05.png,dog\n', encoding='utf-8'
  )
  with pytest.raises(UserError, match='2 labels'):
    probes.open_pool_and_test(f'csv:{tmp_path / "two.csv"}', split='all', test_split='all')


def test_the_command_line_lists_all_protocols():
  """The names are repeated there so that --help does not import jax."""
  assert tuple(probes.PROBES) == cli_protocols.PROBES
  assert tuple(label_sets.LABEL_SET_SOURCES) == cli_protocols.LABEL_SETS


def test_the_pool_of_imagenet_is_big_visions():
  assert probes.PROBE_SPLITS['tfds:imagenet2012'] == ('train[:65000]', 'validation')
