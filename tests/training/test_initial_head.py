"""A head that starts as a linear probe, against scikit-learn, and a head that is reused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

import vit_jax
from tests.tiny import get_config
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError
from vit_jax.evaluate.outputs import FEATURES
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.settings.fields import with_settings
from vit_jax.train import train
from vit_jax.training.evaluation import make_evaluator
from vit_jax.training.initial_head import InitialHead, at_training_size
from vit_jax.training.initial_state import restore_or_init_state
from vit_jax.training.setup import set_up


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
  """Return the directory of a run of 20 steps on digits."""
  workdir = tmp_path_factory.mktemp('runs') / 'backbone'
  train(dataclasses.replace(get_config(), steps=20), workdir)
  return workdir


def tuned(backbone, **settings) -> Config:
  """Return the config of one step of fine-tuning without a change of the parameters."""
  base = with_settings(get_config(), {'model.dropout': 0.0, 'optim.lr': 0.0, 'optim.warmup': '0'})
  return dataclasses.replace(base, init=str(backbone), steps=1, **settings)


def initial_state(config: Config, workdir):
  run = set_up(config, workdir, Watchdog())
  checkpoints = CheckpointManager(workdir)
  state, _, notes = restore_or_init_state(run.program, checkpoints, InitialHead(run, Watchdog()))
  checkpoints.close()
  return run, state, notes


def test_the_head_starts_as_the_logistic_regression_of_the_features(backbone, tmp_path):
  run, state, notes = initial_state(tuned(backbone, init_head='probe'), tmp_path)
  evaluator = make_evaluator(run, run.program.model, lambda outputs: False)
  pool, test = (
    evaluator.rows(state.params, source, FEATURES) for source in (run.train_source, run.eval_source)
  )
  mean, std = pool['features'].mean(0), pool['features'].std(0)
  x, x_test = ((rows['features'] - mean) / std for rows in (pool, test))
  labels, truth = pool['label'][:, 0], test['label'][:, 0]
  # The strength of the regularization follows from the kernel, at which the gradient is 0.
  kernel = np.asarray(state.params['head']['kernel']) * std[:, None]
  theirs = min(
    (
      LogisticRegression(C=10.0 ** (i / 2), max_iter=5000, tol=1e-8).fit(x, labels)
      for i in range(-8, 5)
    ),
    key=lambda fit: np.abs(fit.coef_.T - kernel).max(),
  )
  np.testing.assert_allclose(kernel, theirs.coef_.T, atol=0.02 * np.abs(theirs.coef_).max())
  accuracy = accuracy_score(truth, theirs.predict(x_test))
  line = next(note for note in notes if 'linear probe' in note)
  assert 'of 1,297 images' in line and '500 of test' in line
  assert abs(float(line.split('accuracy of ')[1].split()[0]) - accuracy) <= 0.004  # 2 of 500.
  untouched = vit_jax.load(str(backbone)).params
  for name in ('cls', 'embedding'):
    jax.tree.map(np.testing.assert_array_equal, state.params[name], untouched[name])


def test_the_accuracy_of_the_probe_is_that_of_the_first_evaluation(backbone, tmp_path):
  """The learning rate is 0: after one step the model is still the probe."""
  result = train(tuned(backbone, init_head='probe'), tmp_path / 'run')
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  (probe,) = [record for record in map(json.loads, lines) if 'test_linear_probe' in record]
  assert probe['test_linear_probe'] == pytest.approx(result['test_accuracy'], abs=0.004)
  assert probe['test_majority'] < 0.2 < probe['test_linear_probe']  # Ten classes of digits.
  assert (probe['step'], probe['kind']) == (0, 'probe')


def test_the_head_is_reused_for_the_same_classes(backbone, tmp_path):
  _, state, _ = initial_state(tuned(backbone, init_head='keep'), tmp_path)
  kept = vit_jax.load(str(backbone)).params['head']
  jax.tree.map(np.testing.assert_array_equal, state.params['head'], kept)


def test_reusing_the_head_for_other_classes_is_an_error(backbone, tmp_path):
  path = backbone / 'labels.txt'
  names = path.read_text(encoding='utf-8')
  try:
    path.write_text(names.replace('0\n1\n', '1\n0\n', 1), encoding='utf-8')
    with pytest.raises(UserError, match="init_head=keep: .* first that differ are '1' and '0'"):
      initial_state(tuned(backbone, init_head='keep'), tmp_path)
  finally:
    path.write_text(names, encoding='utf-8')


def test_the_probe_sees_the_crop_of_the_evaluation_in_the_size_of_training():
  data = DataConfig(size=(140, 140), eval_size=(224, 224), eval_crop='center', eval_short_side=256)
  probed = at_training_size(data)
  assert (probed.eval_image_size, probed.eval_short_side) == ((140, 140), 160)  # 256 * 140 / 224.
