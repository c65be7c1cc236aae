"""Whole splits through a model: the same features and best classes as image by image, also where devices hold shares of it."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.evaluate.evaluator import StoppedError, make_pretrained_evaluator
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, shard_from_host


@pytest.fixture(params=[1, 4], ids=['whole', 'shares'])
def subject(request, make_model):
  """(model, the subject it is, parameters) on eight devices, with one copy of the parameters for one or for four of them."""
  model = make_model(width=64, mlp=1024)  # Large enough to be split.
  made, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))
  if request.param > 1:
    mesh = make_mesh(request.param, batches={})
    made = dataclasses.replace(made, mesh=mesh)
    shardings = state_shardings(model.params, mesh)
    params = shard_from_host(model.params, shardings)
    assert (
      'fsdp' in shardings['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel'].spec
    )
  return model, made, params


def test_features_are_those_of_each_image_in_order(subject, source):
  model, made, params = subject
  x, labels = made.features(params, source)
  images = np.stack([np.asarray(Image.open(io.BytesIO(source[i][0]))) for i in range(37)])
  np.testing.assert_allclose(x, model.features(images), atol=1e-5)
  assert labels[:, 0].tolist() == [source[i][1][0] for i in range(37)]


def test_the_best_are_places_among_the_columns(subject, source, by_hand):
  model, made, params = subject
  columns = np.array([3, 0, 2])
  best, labels = made.best(params, source, columns)
  _, logits = by_hand(model, source)
  np.testing.assert_array_equal(best, np.argsort(-logits[:, columns], axis=1))
  assert labels.shape == (37, 1)


def test_a_batch_is_filled_up_to_what_divides_over_the_devices(make_model):
  model = make_model()
  assert make_pretrained_evaluator(model, eval_data_config(model, batch=5))[0].data.eval_batch == 8


def test_progress_is_told_of_every_batch(make_model, source):
  model, told = make_model(), []
  made, params = make_pretrained_evaluator(
    model, eval_data_config(model, batch=16), progress=told.append
  )
  made.features(params, source)
  assert told == [16, 16, 16]


def test_asked_to_stop_it_does_before_the_next_batch(make_model, source):
  model, asked = make_model(), []
  made, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))
  made = dataclasses.replace(
    made, asked=lambda values: asked.append(len(values)) or len(asked) == 2
  )
  with pytest.raises(StoppedError):
    made.features(params, source)
  assert asked == [16, 16]
