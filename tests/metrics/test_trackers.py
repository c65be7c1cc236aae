"""Experiment trackers get the numbers of metrics.jsonl, and never delay nor end a run.

Weights & Biases and MLflow are read back where they are installed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from tests.runs import ENVIRONMENT, ROOT
from tests.test_train import CONFIG, changed
from vit_jax.errors import UserError
from vit_jax.metrics import background, trackers
from vit_jax.metrics.records import read_metrics
from vit_jax.metrics.writer import MetricsWriter
from vit_jax.train import train

SHORT = changed(CONFIG, steps=4)


class Recorded:
  """A tracker in this process."""

  def __init__(self):
    self.records, self.configs, self.finished = [], [], 0

  def __call__(self, workdir, config):
    self.configs.append(config)
    return self

  def log(self, records):
    self.records += records

  def finish(self):
    self.finished += 1


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
  """Return a tracker that stands in for W&B."""
  tracker = Recorded()
  monkeypatch.setitem(trackers.TRACKERS, 'wandb', tracker)
  monkeypatch.setattr('vit_jax.training.setup.check_trackers', lambda names: None)
  return tracker


def numbers(workdir) -> list[tuple[int, dict]]:
  """Return the steps and the numbers of the records in metrics.jsonl."""
  return [
    (record.pop('step'), {name: value for name, value in record.items() if name != 'kind'})
    for record in read_metrics(workdir)
  ]


def test_a_tracker_gets_the_numbers_of_metrics_jsonl_and_the_config(recorded, tmp_path):
  secret = changed(SHORT, writers=('wandb',), init='')
  train(secret, tmp_path / 'run')
  assert [(each.step, each.values) for each in recorded.records] == numbers(tmp_path / 'run')
  (config,) = recorded.configs
  assert config['optim.lr'] == 0.01 and config['writers'] == ('wandb',)
  assert recorded.finished == 1


def test_a_tracker_that_fails_is_reported_once_and_gets_the_records_later(
  recorded, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(background, 'RETRY_PERIOD', 0.01)
  failures = [OSError('no route to host')] * 3

  def fail_at_first(workdir, config):
    if failures:
      raise failures.pop()
    return recorded

  monkeypatch.setitem(trackers.TRACKERS, 'wandb', fail_at_first)
  metrics = MetricsWriter(tmp_path, step=0, steps=9, trackers=('wandb',), config={})
  metrics.write(1, {'loss': 1.0}, kind='train')
  while failures:
    pass
  metrics.close()
  assert [(each.step, each.values) for each in recorded.records] == [(1, {'loss': 1.0})]
  assert capsys.readouterr().err.count('no route to host') == 1


def test_a_tracker_that_hangs_does_not_delay_a_record(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(background, 'FLUSH_TIMEOUT', 0.05)
  release = threading.Event()
  monkeypatch.setitem(trackers.TRACKERS, 'wandb', lambda workdir, config: release.wait(60))
  metrics = MetricsWriter(tmp_path, step=0, steps=9, trackers=('wandb',), config={})
  for step in range(1, 5):
    metrics.write(step, {'loss': 1.0}, kind='train')
  metrics.close()
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
  assert 'wandb lacks 5 records' in capsys.readouterr().err  # Four, and the end.
  release.set()


def test_other_hosts_open_no_tracker(recorded, tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9, write=False, trackers=('wandb',))
  metrics.write(1, {'loss': 1.0}, kind='train')
  metrics.close()
  assert not recorded.configs and not recorded.records


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(name, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda module: None if module == name else find(module)
  )
  with pytest.raises(UserError, match=rf"config.writers='{name}' needs {name}: pip install .*\["):
    trackers.check_trackers((name,))


def test_mlflow_without_a_database_needs_a_place_for_the_run(monkeypatch):
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda module: None if module == 'sqlalchemy' else 'found'
  )
  trackers.check_trackers(('mlflow',), {'MLFLOW_TRACKING_URI': 'http://localhost:5000'})
  with pytest.raises(UserError, match='set MLFLOW_TRACKING_URI'):
    trackers.check_trackers(('mlflow',), {})


def test_wandb_is_refused_where_it_would_ask_for_a_login(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda module: 'found')
  monkeypatch.setattr('sys.stdin.isatty', lambda: True, raising=False)
  env = {'NETRC': str(tmp_path / 'netrc')}
  with pytest.raises(UserError, match='wandb login'):
    trackers.check_trackers(('wandb',), env)
  (tmp_path / 'netrc').write_text('machine api.wandb.ai login user password x', encoding='utf-8')
  trackers.check_trackers(('wandb',), env)
  trackers.check_trackers(('wandb',), {'WANDB_MODE': 'offline'})
  trackers.check_trackers(('wandb',), {'WANDB_API_KEY': 'x'})


def wandb_records(path):
  """Yield the records of a .wandb file: blocks of 32 KiB, and in them parts of records.

  After a header of 7 bytes, a part has a checksum, a length, and a type: 1 complete, 2 first,
  3 middle, 4 last.
  """
  from wandb.proto.wandb_internal_pb2 import Record

  data, place, record = path.read_bytes(), 7, b''
  while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
      place += 32768 - place % 32768
      continue
    length, kind = int.from_bytes(data[place + 4 : place + 6], 'little'), data[place + 6]
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield Record.FromString(record)
      record = b''


def train_in_a_process(workdir, writers: str, environment: dict[str, str]):
  """Train for 4 steps in another process: trackers start threads and servers."""
  command = [
    sys.executable, 'run_pretrain.py', '--config=tests/tiny.py', f'--config.writers={writers}',
    f'--workdir={workdir}', '--no-report', '--config.steps=4', '--config.save_every=2',
  ]  # fmt: skip
  environment = os.environ | ENVIRONMENT | environment
  environment['PYTHONPATH'] = os.pathsep.join(filter(None, sys.path))
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert 'cannot be written' not in done.stderr and 'lacks' not in done.stderr, done.stderr


def test_wandb_has_the_records_and_a_run_that_resumes_continues_its_run(tmp_path):
  pytest.importorskip('wandb')
  workdir, offline = tmp_path / 'run', {'WANDB_MODE': 'offline'}
  train_in_a_process(workdir, 'wandb', offline)
  (file,) = workdir.glob('wandb/offline-run-*/run-*.wandb')
  records = list(wandb_records(file))
  rows = [
    {
      '/'.join(item.nested_key) or item.key: json.loads(item.value_json)
      for item in each.history.item
    }
    for each in records
    if each.HasField('history')
  ]
  rows = [{k: v for k, v in row.items() if not k.startswith('_')} for row in rows]
  expected = [{'step': step} | values for step, values in numbers(workdir)]
  assert rows == [pytest.approx(row) for row in expected]
  config = {
    item.key or '/'.join(item.nested_key): json.loads(item.value_json)
    for each in records
    for item in [*each.run.config.update, *each.config.update]
  }
  assert config['optim.lr'] == 0.01 and config['data.train'] == 'builtin:digits'
  shutil.rmtree(workdir / 'checkpoints' / '4')
  train_in_a_process(workdir, 'wandb', offline)
  files = list(workdir.glob('wandb/offline-run-*/run-*.wandb'))
  identity = (workdir / 'wandb.id').read_text(encoding='utf-8').strip()
  assert len(files) == 2 and {path.name for path in files} == {f'run-{identity}.wandb'}


def test_mlflow_has_the_records_and_a_run_that_resumes_continues_its_run(tmp_path, monkeypatch):
  pytest.importorskip('mlflow')
  workdir, store = tmp_path / 'run', tmp_path / 'store'
  environment = {'MLFLOW_TRACKING_URI': f'file:{store}', 'MLFLOW_ALLOW_FILE_STORE': 'true'}
  train_in_a_process(workdir, 'mlflow', environment)
  (run,) = [path.parent for path in store.glob('*/*/params')]
  assert run.name == (workdir / 'mlflow.id').read_text(encoding='utf-8').strip()
  # A file of MLflow for each metric: lines of time, value and step.
  logged = lambda name: [
    (int(step), float(value))
    for _, value, step, *_ in map(str.split, (run / 'metrics' / name).read_text().splitlines())
  ]
  expected = numbers(workdir)
  for name in {name for _, values in expected for name in values}:
    assert logged(name) == [
      (step, pytest.approx(values[name])) for step, values in expected if name in values
    ]
  assert (run / 'params' / 'optim.lr').read_text() == '0.01'
  shutil.rmtree(workdir / 'checkpoints' / '4')
  train_in_a_process(workdir, 'mlflow', environment)
  assert len(list(store.glob('*/*/params'))) == 1
  assert [step for step, _ in logged('loss')] == [1, 2, 3, 4, 3, 4]
  assert 'status: 3' in (run / 'meta.yaml').read_text()  # Finished.
