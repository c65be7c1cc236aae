"""Published results: what is recorded, when a record is stale, and what is reported."""

import dataclasses
import statistics

import numpy as np
import pytest

from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.paper import published_results, reproduce
from vit_jax.paper.published_results import PUBLISHED_RESULTS, PublishedResult
from vit_jax.paper.reproduce import describe_status, explain_missing, list_statuses, read_records
from vit_jax.paper.runs import ExperimentRun

SETTINGS = {
  'steps': 3, 'data.train': 'builtin:digits', 'data.split': 'train[:64]',
  'data.eval_split': 'test[:40]', 'data.batch': 16, 'data.eval_batch': 40, 'data.size': (8, 8),
  'model.variant': 'mu/4', 'model.depth': 1, 'model.width': 0, 'model.mlp': 0, 'model.heads': 0,
  'optim.grad_accum_steps': 1, 'eval_every': '0', 'save_every': '0',
}  # fmt: skip


def tiny(**changes) -> PublishedResult:
  run = ExperimentRun(row='', column='', config='quickstart', settings=SETTINGS | changes)
  return PublishedResult(
    title='digits', target=1.0, data='digits', source='none', seeds=(0, 1), make_run=lambda: run
  )


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  """Return (record, root, out) of a result that was run."""
  folder = tmp_path_factory.mktemp('reproduce')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reproduce, 'PUBLISHED_RESULTS', {'tiny': tiny()})
    record = reproduce.reproduce('tiny', root=folder / 'runs', out=folder / 'out')
  assert reproduce.points_missed(tiny(), record) == pytest.approx(1 - float(record.accuracy))
  return record, folder


def test_the_record_has_the_accuracies_of_the_seeds(recorded):
  record, folder = recorded
  assert read_records(folder / 'out') == {'tiny': record}
  accuracies = [float(each) for each in record.accuracies.split()]
  assert len(accuracies) == 2
  assert all(accuracy % 2.5 == 0 for accuracy in accuracies)  # Of 40 examples.
  assert float(record.accuracy) == pytest.approx(statistics.mean(accuracies))
  assert float(record.deviation) == pytest.approx(statistics.stdev(accuracies), abs=0.01)
  assert (record.seeds, record.examples, record.classes) == ('0 1', '64', '10')


def test_a_record_is_matched_or_missed_by_the_points_below_target_and_tolerance(recorded):
  record = dataclasses.replace(recorded[0], accuracy='90.00', deviation='')
  for target, tolerance, start in ((90.0, 0, 'matched'), (90.5, 0.5, 'matched'),
                                   (91.25, 0.5, 'missed by 0.75')):  # fmt: skip
    result = dataclasses.replace(tiny(), target=target, tolerance=tolerance)
    assert describe_status('tiny', result, record).startswith(f'{start}: 90.00 %')


@pytest.mark.parametrize(
  'changes, reason',
  [
    ({'optim.weight_decay': 0.2}, 'the settings or the train step'),
    ({'model.depth': 2}, 'the settings or the train step'),
    ({'log_every': '7'}, ''),  # It changes no number.
  ],
)
def test_a_record_is_stale_if_a_setting_that_changes_the_number_differs(recorded, changes, reason):
  status = describe_status('tiny', tiny(**changes), recorded[0])
  assert status.startswith(f'stale: {reason}' if reason else 'matched')


def test_a_record_is_stale_if_the_step_or_the_images_differ(recorded, monkeypatch):
  from vit_jax import step
  from vit_jax.data import loader

  with monkeypatch.context() as patch:
    norm = step.optax.tree.norm
    patch.setattr(step.optax.tree, 'norm', lambda tree: 1.0 * norm(tree) + 1)
    assert 'the train step' in describe_status('tiny', tiny(), recorded[0])
  write = loader.write_train_image

  def write_darker(data, out, **options):
    write(data, out, **options)
    out[...] = out // 2

  monkeypatch.setattr(loader, 'write_train_image', write_darker)
  assert 'stale: the data' in describe_status('tiny', tiny(), recorded[0])


def test_a_record_without_its_data_is_checked_without_it(recorded, monkeypatch):
  def fail(config):
    raise UserError('no such folder')

  monkeypatch.setattr(reproduce, 'open_sources', fail)
  assert describe_status('tiny', tiny(), recorded[0]).startswith('matched')
  assert describe_status('tiny', tiny(), None) == 'not runnable here: no such folder'


def test_what_is_missing_is_named(monkeypatch, tmp_path):
  assert explain_missing(tiny()) == ''
  assert 'GPU' in explain_missing(dataclasses.replace(tiny(), device='gpu'))
  quoted = dataclasses.replace(tiny(), make_run=None, needs='ImageNet')
  assert explain_missing(quoted) == 'ImageNet'
  run = dataclasses.replace(tiny().make_run(), init=str(tmp_path / 'absent.npz'))
  assert 'absent.npz does not exist' in explain_missing(
    dataclasses.replace(tiny(), make_run=lambda: run)
  )


def test_an_unknown_name_and_a_result_that_is_quoted_are_errors(tmp_path):
  with pytest.raises(UserError, match='no such result'):
    reproduce.reproduce('fashion', root=tmp_path, out=tmp_path)
  with pytest.raises(UserError, match='not runnable here: ImageNet'):
    reproduce.reproduce('deit3-b16', root=tmp_path, out=tmp_path)


def test_there_are_at_least_25_results_with_a_source_and_valid_settings():
  assert len(PUBLISHED_RESULTS) >= 25
  for result in PUBLISHED_RESULTS.values():
    assert 0 < result.target < 100 and result.source and result.title
    assert bool(result.make_run) != bool(result.needs)
    if result.make_run:
      assert 0 < result.minutes <= (9 if result.device == 'gpu' else 300)
      validate(reproduce.build_config(result))


def test_the_source_of_cifar_is_the_one_of_the_environment(monkeypatch):
  train = lambda name: PUBLISHED_RESULTS[name].make_run().build_config().data.train
  monkeypatch.delenv('VIT_JAX_CIFAR100', raising=False)
  monkeypatch.setenv('VIT_JAX_CIFAR10', 'folder:copies')
  assert train('vit-lite-cifar10') == train('cifar10-94-fast') == 'folder:copies'
  assert train('vit-lite-cifar100') == 'tfds:cifar100'


def test_the_kind_of_the_data_is_recorded_without_a_path(recorded, tmp_path, png):
  assert recorded[0].data == 'builtin:digits'
  for split in ('train', 'test'):
    for label in 'ab':
      (tmp_path / split / label).mkdir(parents=True)
      (tmp_path / split / label / 'one.PNG').write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
  data = {'data.train': f'folder:{tmp_path}', 'data.split': 'train', 'data.eval_split': 'test'}
  config = reproduce.build_config(tiny(**data))
  source, _ = reproduce.open_sources(config)
  assert reproduce.describe_source(config, source) == 'folder: of .png files'


def test_the_list_has_a_state_for_each_result(tmp_path, monkeypatch):
  few = {name: PUBLISHED_RESULTS[name] for name in ('deit3-b16', 'digits-svc')}
  monkeypatch.setattr(reproduce, 'PUBLISHED_RESULTS', few)
  states = {name: status for name, _, status in list_statuses(tmp_path)}
  assert states == {'deit3-b16': 'not runnable here: ImageNet', 'digits-svc': 'not run'}
  assert published_results.FASHION_MNIST.startswith('idx:')
