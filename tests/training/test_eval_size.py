"""Evaluation at another size than training: `data.eval_size`."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import vit_jax
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.pretrained.resample import resample_offsets, resample_positions
from vit_jax.settings.fields import with_settings
from vit_jax.train import train
from vit_jax.training.program import abstract_state, make_program
from vit_jax.training.task import make_task

# 2 x 2 patches in training, 3 x 4 in evaluation.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=48, size=(8, 8), eval_size=(12, 16)),
  model=ModelConfig(variant='mu/4', depth=1),
  optim=OptimConfig(lr=1e-2),
  steps=3,
  eval_every='0',
  save_every='0',
)
POSITION = 'Transformer/posembed_input/pos_embedding'
TABLE = 'Transformer/encoderblock/MultiHeadDotProductAttention_1/relative/table'


def flat(params: dict) -> dict[str, np.ndarray]:
  return {name: np.asarray(x) for name, x in flatten_dict(params, sep='/').items()}


def program_of(config: Config):
  return make_program(config, make_task(config), examples=100, classes=10, label_slots=1)


def drawn_params(program) -> dict:
  """Return sharded parameters, every array drawn."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(program).params)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x, sharding: jax.device_put(rng.normal(size=x.shape).astype(np.float32), sharding),
    program.param_shapes,
    shardings,
  )


@pytest.mark.parametrize('fsdp', [1, 4])
@pytest.mark.parametrize('position', ['learned', 'relative2d'])
def test_only_positions_change_and_as_numpy_resamples_them(position, fsdp):
  config = with_settings(CONFIG, {'model.position': position, 'mesh.fsdp': fsdp})
  program = program_of(config)
  shapes, resample = program.eval_param_shapes, program.make_resample()
  params = drawn_params(program)
  before, after = flat(params), flat(resample(params))
  name = TABLE if position == 'relative2d' else POSITION
  grids = (3, 4), (2, 2)
  if position == 'relative2d':
    expected = resample_offsets(before[name], *grids)
  else:
    expected = resample_positions(before[name], 13, *grids)
  np.testing.assert_allclose(after.pop(name), expected, rtol=0, atol=1e-6)
  assert after.keys() == before.keys() - {name}
  for other, array in after.items():
    np.testing.assert_array_equal(array, before[other])
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
    lambda x: x.shape, resample(params)
  )


def test_a_grid_of_as_many_patches_is_resampled_too():
  config = with_settings(CONFIG, {'data.size': (8, 16), 'data.eval_size': (16, 8)})
  program = program_of(config)
  resample = program.make_resample()
  params = drawn_params(program)
  before, after = flat(params)[POSITION], flat(resample(params))[POSITION]
  assert after.shape == before.shape
  np.testing.assert_allclose(after, resample_positions(before, 9, (4, 2), (2, 4)), atol=1e-6)


@pytest.mark.parametrize('settings', [{'data.eval_size': (0, 0)}, {'model.position': 'sincos2d'}])
def test_parameters_that_fit_are_the_same_objects(settings):
  program = program_of(with_settings(CONFIG, settings))
  resample = program.make_resample()
  params = object()
  assert resample(params) is params


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'data.eval_size': (30, 30)}, r'eval_size=\(30, 30\).*patches of 4x4'),
    (
      {
        'model.variant': 'AxialR1.1x1',
        'model.depth': 0,
        'data.size': (32, 32),
        'data.eval_size': (64, 64),
      },
      'AxialR1.1x1 cannot be evaluated at another size.*relative',
    ),
  ],
)
def test_a_size_that_the_model_cannot_take_is_an_error_before_anything_is_written(
  tmp_path, settings, words
):
  with pytest.raises(UserError, match=words):
    train(with_settings(CONFIG, settings), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Return (directory, metrics) of a run on eight devices."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  return workdir, train(dataclasses.replace(CONFIG, probes=('knn:builtin:digits',)), workdir)


def test_the_run_is_evaluated_and_loaded_at_the_size(run):
  """The model predicts all images at once, and NumPy computes the loss in float64."""
  workdir, printed = run
  model, source = vit_jax.load(str(workdir)), open_source('builtin:digits', 'test')
  assert model.size == (12, 16)
  (batch,) = eval_batches(
    source, eval_data_config(model, batch=len(source)), host=0, hosts=1, exact=True
  )
  assert batch['image'].shape == (500, 12, 16, 3)
  logits = np.asarray(model.logits(batch['image']), np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  losses = -np.take_along_axis(log_probabilities, batch['label'], axis=1)
  assert printed['test_loss'] == pytest.approx(losses.mean(), rel=1e-5)


def test_loading_a_run_at_the_training_size_resamples_nothing(run):
  stored = flat(vit_jax.load(str(run[0]), size='native').params)[POSITION]
  assert stored.shape == (1, 1 + 4, 32)
  np.testing.assert_array_equal(flat(vit_jax.load(str(run[0]), size=8).params)[POSITION], stored)
  evaluated = flat(vit_jax.load(str(run[0])).params)[POSITION]
  np.testing.assert_array_equal(evaluated, resample_positions(stored, 13, (3, 4), (2, 2)))


def test_a_run_that_starts_from_it_has_its_positions(run, tmp_path, capsys):
  """Resampling them to the size of evaluation and back would change them."""
  config = with_settings(
    CONFIG, {'init': str(run[0]), 'init_head': 'keep', 'optim.lr': 0.0, 'steps': 1}
  )
  train(config, tmp_path / 'next')
  stored, kept = (
    flat(vit_jax.load(str(path), size='native').params)[POSITION]
    for path in (run[0], tmp_path / 'next')
  )
  np.testing.assert_array_equal(kept, stored)
