"""The evaluator: one row per example, in order, with copies and with shards of the parameters."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax.config import DataConfig, ModelConfig
from vit_jax.evaluate.evaluator import (
  Evaluator,
  Output,
  PreemptedError,
  concatenate_rows,
  make_pretrained_evaluator,
)
from vit_jax.evaluate.outputs import FEATURES, classification, top_k_among
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, shard_from_host


@pytest.fixture(params=[1, 4], ids=['copies', 'shards'])
def evaluated(request, make_model):
  """Return (model, evaluator, parameters) on eight devices, replicated or sharded over four."""
  model = make_model(width=64, mlp=1024)  # Large enough to be split.
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))
  if request.param > 1:
    mesh = make_mesh(request.param, batches={})
    evaluator = dataclasses.replace(evaluator, mesh=mesh, programs={})
    shardings = state_shardings(model.params, mesh)
    params = shard_from_host(model.params, shardings)
    kernel = shardings['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel']
    assert 'fsdp' in kernel.spec
  return model, evaluator, params


def read_images(source) -> np.ndarray:
  return np.stack([np.asarray(Image.open(io.BytesIO(source[i][0]))) for i in range(len(source))])


def test_features_are_those_of_each_image_in_order(evaluated, source):
  model, evaluator, params = evaluated
  rows = evaluator.rows(params, source, FEATURES)
  np.testing.assert_allclose(rows['features'], model.features(read_images(source)), atol=1e-5)
  assert rows['label'][:, 0].tolist() == [source[i][1][0] for i in range(37)]
  assert rows['mask'].tolist() == [True] * 37


def test_top_k_are_places_among_the_selected_logits(evaluated, source, by_hand):
  model, evaluator, params = evaluated
  rows = evaluator.rows(params, source, top_k_among((3, 0, 2)))
  _, logits = by_hand(model, source)
  np.testing.assert_array_equal(rows['top5'], np.argsort(-logits[:, [3, 0, 2]], axis=1))


def test_ties_go_to_the_lowest_class():
  logits = jnp.array([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])
  output = classification('softmax')
  model = SimpleNamespace(apply=lambda variables, images: logits)
  top = output.apply(model, {}, {'image': None, 'label': jnp.array([[0]])})['top5']
  assert top.tolist() == [[1, 2, 4, 0, 5]]
  np.testing.assert_array_equal(top, np.argsort(-logits, axis=1, kind='stable')[:, :5])


def test_the_batch_is_rounded_up_to_a_multiple_of_the_devices(make_model):
  model = make_model()
  evaluator, _ = make_pretrained_evaluator(model, eval_data_config(model, batch=5))
  assert evaluator.batch == 8


def test_on_batch_is_called_with_the_size_of_every_batch(make_model, source):
  model, sizes = make_model(), []
  data = eval_data_config(model, batch=16)
  evaluator, params = make_pretrained_evaluator(model, data, on_batch=sizes.append)
  evaluator.rows(params, source, FEATURES)
  assert sizes == [16, 16, 16]


def test_should_stop_ends_the_evaluation_before_the_next_batch(make_model, source):
  model, seen = make_model(), []
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))

  def should_stop(outputs) -> bool:
    seen.append(len(outputs['mask']))
    return len(seen) == 2

  evaluator = dataclasses.replace(evaluator, should_stop=should_stop)
  with pytest.raises(PreemptedError):
    evaluator.rows(params, source, FEATURES)
  assert seen == [16, 16]


def test_a_second_evaluation_does_not_compile_again(make_model, source):
  model = make_model()
  for on_batch in (lambda n: None, lambda n: n):
    data = eval_data_config(model, batch=16)
    evaluator, params = make_pretrained_evaluator(model, data, on_batch=on_batch)
    evaluator.rows(params, source, FEATURES)
  assert len(model.programs) == 1


def test_kernels_see_the_mesh_that_a_batch_is_split_over(make_model, source):
  model, sizes = make_model(), []
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))

  def apply(model, params, batch):
    sizes.append(jax.sharding.get_abstract_mesh().size)
    return {'mean': batch['image'].mean(axis=(1, 2, 3))}

  evaluator.rows(params, source, Output(apply))
  assert sizes == [8]


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Image i is filled with the number i."""

  count: int
  max_labels: int = 1

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return np.full((4, 4, 3), i, np.uint8), (i % 7,), str(i)


FIRST_PIXEL = Output(lambda model, params, batch: {'pixel': batch['image'][:, 0, 0, 0]})


def evaluate_numbers(count: int, batch: int) -> dict[str, np.ndarray]:
  evaluator = Evaluator(
    model=SimpleNamespace(config=ModelConfig()),
    param_shapes={},
    mesh=make_mesh(1, batches={}),
    data=DataConfig(eval_batch=batch, size=(4, 4)),
  )
  return evaluator.rows({}, Numbers(count), FIRST_PIXEL)


@pytest.mark.parametrize(('count', 'batch'), [(1, 8), (16, 8), (17, 8), (100, 40)])
def test_every_example_has_one_row(count, batch):
  rows = evaluate_numbers(count, batch)
  assert rows['pixel'].tolist() == list(range(count))
  assert rows['label'][:, 0].tolist() == [i % 7 for i in range(count)]
  assert set(rows) == {'pixel', 'label', 'mask'}


@pytest.mark.parametrize('order', [(0, 1), (1, 0)], ids=['in order', 'swapped'])
def test_rows_of_two_hosts_are_in_the_order_of_the_source(monkeypatch, order):
  """Each host loads its half of a batch. The mesh may list the devices of host 1 first."""
  expected = evaluate_numbers(21, 16)
  load_as_one_host = Evaluator._load

  def load_as_two_hosts(self, source, output, **_):
    parts = [load_as_one_host(self, source, output, host=i, hosts=2) for i in order]
    for halves in zip(*parts, strict=True):
      yield {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}

  monkeypatch.setattr(Evaluator, '_load', load_as_two_hosts)
  rows = evaluate_numbers(21, 16)
  for name, values in expected.items():
    np.testing.assert_array_equal(rows[name], values)


def test_concatenated_rows_keep_names_and_order():
  parts = [{'a': np.array([1, 2])}, {'a': np.array([3])}]
  assert concatenate_rows(parts)['a'].tolist() == [1, 2, 3]
