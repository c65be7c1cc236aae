"""A sweep: what is trained on, what is evaluated, and which point of the grid is chosen."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.paper.runner_worker import FIRST
from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.paper import sweep as sweep_module
from vit_jax.paper.runs import ExperimentRun, run_workdir
from vit_jax.paper.sweep import Point, choose, hold_out_examples, last_run, sweep
from vit_jax.runtime.preemption import Preemption
from vit_jax.training import setup


def points(*settings: dict, base: ExperimentRun = FIRST) -> list[ExperimentRun]:
  return [
    dataclasses.replace(
      base,
      row=' '.join(f'{name}={value}' for name, value in each.items()),
      settings=base.settings | {'steps': 12, 'data.split': 'train', 'log_ids': True} | each,
    )
    for each in settings
  ]


def rates(*values: float) -> list[ExperimentRun]:
  return points(*({'optim.lr': value} for value in values))


def names(source) -> frozenset[str]:
  return frozenset(source[i][2] for i in range(len(source)))


@pytest.fixture
def photos(tmp_path) -> ExperimentRun:
  """Return a run that fine-tunes a model, with a probe, on 20 + 4 images of two classes."""
  rng = np.random.default_rng(0)
  for split, count in {'train': 10, 'test': 2}.items():
    for label, value in {'dark': 60, 'light': 190}.items():
      folder = tmp_path / 'photos' / split / label
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(value - 50, value + 50, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4', depth=1), classes=0, size=(8, 8))
  return ExperimentRun(
    row='',
    column='',
    config='configs/finetune.py:mu/4,folder',
    settings={
      'data.train': f'folder:{tmp_path / "photos"}', 'data.batch': 8, 'data.size': (8, 8),
      'data.workers': 0, 'model.depth': 1, 'model.dtype': 'float32', 'optim.warmup': '1',
      'init': str(tmp_path / 'model.npz'), 'init_head': 'probe', 'eval_every': '1',
    },
  )  # fmt: skip


def test_the_test_split_is_read_once_and_no_held_out_image_is_trained_on_before(
  photos, tmp_path, monkeypatch
):
  trained, evaluated = [], []
  train_batches, rows = setup.train_batches, Evaluator.rows

  def record_training(source, *args, **options):
    trained.append(names(source))
    return train_batches(source, *args, **options)

  def record_evaluation(self, params, source, output):
    evaluated.append(names(source))
    return rows(self, params, source, output)

  monkeypatch.setattr(setup, 'train_batches', record_training)
  monkeypatch.setattr(Evaluator, 'rows', record_evaluation)
  runs = points({'optim.lr': 1e-3}, {'optim.lr': 1e-2}, base=photos)
  data = photos.settings['data.train']
  everything, test = (names(open_source(data, split)) for split in ('train', 'test'))
  assert (len(everything), len(test)) == (20, 4)
  sweep(runs, tmp_path / 'runs', percent=20)
  rest, again, last = trained
  held_out = everything - rest
  assert rest == again and len(held_out) == 4 and last == everything
  # The probe reads both parts of a candidate, and then only the training images.
  assert evaluated == [rest, held_out, held_out] * 2 + [everything, test]


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """Return (root directory, points, best run, result) of a sweep of which one point diverges."""
  root = tmp_path_factory.mktemp('sweep')
  return root, *sweep(rates(1e-5, 1e-2, 1e30), root, percent=10)


def test_the_point_with_the_highest_held_out_accuracy_is_trained_on_everything(swept):
  root, outcomes, best, result = swept
  read = lambda run: json.loads(
    (run_workdir(run, root) / 'result.json').read_text(encoding='utf-8')
  )
  measured = [
    next(
      x['train_accuracy'] for x in read(hold_out_examples(run, 10))['records'] if 'train_loss' in x
    )
    for run in rates(1e-5, 1e-2)
  ]
  assert [point.accuracy for point in outcomes[:2]] == measured
  assert best.settings['optim.lr'] == (1e-5, 1e-2)[int(np.argmax(measured))]
  assert result == read(last_run(best))
  (evaluation,) = (record for record in result['records'] if record['kind'] == 'eval')
  assert evaluation['test_examples'] == 200 and evaluation['step'] == 12


def test_a_point_that_diverges_is_an_outcome_of_the_sweep(swept):
  _, outcomes, best, _ = swept
  assert 'not finite' in outcomes[2].failure and not outcomes[0].failure
  assert best.settings['optim.lr'] != 1e30


def test_neither_complete_nor_diverged_runs_are_repeated(swept):
  root, outcomes, best, result = swept
  written = lambda: {path: path.stat().st_mtime_ns for path in root.rglob('metrics.jsonl')}
  before = written()
  again = sweep(rates(1e-5, 1e-2, 1e30), root, percent=10)
  assert written() == before and len(before) == 4
  summary = lambda points: [(point.run.row, point.accuracy, point.failure) for point in points[:2]]
  assert summary(again[0]) == summary(outcomes) and again[0][2].failure == outcomes[2].failure
  assert (again[1].row, again[2]) == (best.row, result)


class StopAfter(Preemption):
  """Asks to stop when it has been called `count` times."""

  def __init__(self, count: int):
    super().__init__()
    self.left = count

  def should_stop(self) -> bool:
    self.left -= 1
    return self.left < 0


def test_an_interrupted_run_resumes_from_its_checkpoint(tmp_path):
  runs = rates(1e-4, 1e-2)
  for _ in range(2):
    with pytest.raises(SystemExit):
      sweep(runs, tmp_path / 'cut', percent=10, preemption=StopAfter(5))
  cut, complete = (sweep(runs, tmp_path / name, percent=10) for name in ('cut', 'complete'))
  lines = lambda name: {
    path.relative_to(tmp_path / name): path.read_text(encoding='utf-8')
    for path in (tmp_path / name).rglob('ids.jsonl')
  }
  assert lines('cut') == lines('complete')  # Every step once, with its exact loss.
  assert cut[2]['records'][-1] == complete[2]['records'][-1]


def test_running_out_of_memory_is_an_outcome_that_the_next_sweep_tries_again(tmp_path, monkeypatch):
  load_or_train, calls = sweep_module.load_or_train, []

  def run_out_of_memory(run, root, **options):
    calls.append(run.row)
    if run.settings['data.batch'] == 64:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes')
    return load_or_train(run, root, **options)

  monkeypatch.setattr(sweep_module, 'load_or_train', run_out_of_memory)
  runs = points({'data.batch': 32}, {'data.batch': 64})
  for _ in range(2):
    outcomes, best, _ = sweep(runs, tmp_path, percent=10)
    assert outcomes[1].failure.startswith('out of memory')
    assert best.settings['data.batch'] == 32
  assert calls == ['data.batch=32', 'data.batch=64', 'data.batch=32'] * 2


def test_another_error_of_the_device_is_no_outcome(tmp_path, monkeypatch):
  def fail(run, root, **options):
    raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

  monkeypatch.setattr(sweep_module, 'load_or_train', fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
    sweep(rates(1e-3, 1e-2), tmp_path, percent=10)


def test_if_all_points_fail_the_error_gives_the_reason_of_the_first():
  failed = [Point(run=run, directory=Path(), failure='diverged') for run in rates(1, 2)]
  with pytest.raises(UserError, match=r'all 2 points .* optim.lr=1: diverged'):
    choose(failed)


def test_of_equal_accuracies_the_lower_loss_is_chosen_and_then_the_first(capsys):
  make = lambda run, loss: Point(run=run, directory=Path(), accuracy=0.5, loss=loss)
  runs = rates(1, 2, 3)
  assert choose([make(run, loss) for run, loss in zip(runs, (3, 1, 2), strict=True)]) is runs[1]
  assert 'optim.lr=2 has the lowest loss' in capsys.readouterr().err
  assert choose([make(run, 1.0) for run in runs]) is runs[0]
  assert 'the first of them' in capsys.readouterr().err


def test_a_single_point_is_trained_on_everything_at_once(tmp_path, capsys):
  (run,) = rates(1e-2)
  outcomes, best, result = sweep([run], tmp_path, percent=10)
  assert outcomes == [] and best is run and len([*tmp_path.glob('*/config.json')]) == 1
  assert 'the only point of the grid' in capsys.readouterr().err
  assert result['records'][-1]['test_examples'] == 200


def test_points_that_are_the_same_run_are_refused(tmp_path):
  with pytest.raises(UserError, match='log_every=5 and log_every=7 are the same run'):
    sweep(points({'log_every': '5'}, {'log_every': '7'}), tmp_path, percent=10)


def test_evaluation_data_that_do_not_exist_are_an_error_before_the_first_run(tmp_path):
  runs = points({'data.eval_split': 'val', 'seed': 0}, {'data.eval_split': 'val', 'seed': 1})
  with pytest.raises(UserError, match="no split 'val'"):
    sweep(runs, tmp_path, percent=10)
  assert not [*tmp_path.iterdir()]
