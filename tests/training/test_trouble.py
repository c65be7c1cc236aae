"""Runs whose directory, logs or code fail while they train: what is saved and what is shown."""

import shutil
import threading
import time

import pytest

from tests.soak.damage import IGNORE_UNAWAITED_FUTURES
from tests.test_train import CONFIG, changed
from tests.tiny import get_config
from vit_jax.checkpoint import io
from vit_jax.checkpoint.manager import list_saved_steps
from vit_jax.errors import StorageError
from vit_jax.metrics import background, step_log, writer
from vit_jax.metrics.records import read_metrics
from vit_jax.metrics.step_log import StepLog
from vit_jax.runtime import files, run_lock
from vit_jax.runtime.run_lock import RunLock
from vit_jax.train import train
from vit_jax.training.evaluation import Evaluations

pytestmark = pytest.mark.filterwarnings(IGNORE_UNAWAITED_FUTURES)
SHORT = changed(CONFIG, steps=4)


def at_step(monkeypatch, step, action):
  """Call `action` when a run logs `step`."""
  append = StepLog.append

  def append_and_act(self, done, *args):
    append(self, done, *args)
    if done == step:
      action()

  monkeypatch.setattr(StepLog, 'append', append_and_act)


@pytest.mark.parametrize('change', ['removed', 'renamed', 'replaced'])
def test_a_run_directory_that_is_gone_ends_the_run_and_is_not_created_again(
  tmp_path, monkeypatch, change
):
  workdir, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'

  def change_directory():
    while change == 'removed' and workdir.exists():  # A save may still write into it.
      shutil.rmtree(workdir, ignore_errors=True)
    if change != 'removed':
      workdir.rename(elsewhere)
    if change == 'replaced':
      workdir.mkdir()

  at_step(monkeypatch, 2, change_directory)
  with pytest.raises(StorageError, match=f'{workdir} was removed or renamed') as error:
    train(SHORT, workdir)
  assert error.value.exit_code == 74 and '\n' not in str(error.value)
  names = {'removed': set(), 'renamed': {'elsewhere'}, 'replaced': {'run', 'elsewhere'}}
  assert {path.name for path in tmp_path.iterdir()} == names[change]
  assert change != 'replaced' or not (workdir / 'checkpoints').exists()


def test_the_heartbeat_notices_a_renamed_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, 'HEARTBEAT_PERIOD', 0.01)
  (tmp_path / 'run').mkdir()
  lock = RunLock(tmp_path / 'run')
  lock.check_held()
  (tmp_path / 'run').rename(tmp_path / 'elsewhere')
  end = time.monotonic() + 60
  with pytest.raises(StorageError, match='run was removed or renamed'):
    while time.monotonic() < end:
      lock.check_held()
  lock.release()
  assert {path.name for path in tmp_path.iterdir()} == {'elsewhere'}


def test_an_error_does_not_abort_a_checkpoint_that_is_being_written(tmp_path, monkeypatch):
  raised, format_manifest, run_due = threading.Event(), io.format_manifest, Evaluations.run_due

  def wait_for_the_error(*args):
    assert raised.wait(60)
    time.sleep(1)
    return format_manifest(*args)

  def fail_at_step_2(self, state, step):
    if step == 2:
      raised.set()
      raise ZeroDivisionError('the cause')
    return run_due(self, state, step)

  monkeypatch.setattr(io, 'format_manifest', wait_for_the_error)
  monkeypatch.setattr(Evaluations, 'run_due', fail_at_step_2)
  with pytest.raises(ZeroDivisionError, match='the cause'):
    train(SHORT, tmp_path / 'run')
  assert list_saved_steps(tmp_path / 'run' / 'checkpoints') == [1]


def fail_to_append(monkeypatch, module):
  def fail(path, text):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(module, 'append_text', fail)
  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.001,) * 3)
  monkeypatch.setattr(background, 'RETRY_PERIOD', 0.01)


def test_a_run_without_space_for_its_metrics_completes(tmp_path, monkeypatch, capsys):
  fail_to_append(monkeypatch, writer)
  result = train(SHORT, tmp_path / 'run')
  assert result['step'] == 4 and not read_metrics(tmp_path / 'run')
  assert set(list_saved_steps(tmp_path / 'run' / 'checkpoints')) == {1, 2, 3, 4}
  text = capsys.readouterr().err
  assert text.count('metrics.jsonl cannot be written: No space left') == 1
  assert 'metrics.jsonl lacks 6 records' in text  # Four steps, an evaluation, and goodput.


def test_a_run_without_space_for_its_examples_saves_and_exits_with_74(tmp_path, monkeypatch):
  fail_to_append(monkeypatch, step_log)
  config = changed(get_config(), steps=9, save_every='0', eval_every='0')
  with pytest.raises(StorageError, match='ids.jsonl lacks .* step 1 .*No space') as error:
    train(config, tmp_path / 'run')
  assert error.value.exit_code == 74
  assert list_saved_steps(tmp_path / 'run' / 'checkpoints') == [1]


def test_curves_that_cannot_be_written_do_not_fail_a_complete_run(tmp_path, monkeypatch, capsys):
  at_step(monkeypatch, 4, lambda: (tmp_path / 'run' / 'curves.png').mkdir())
  assert train(SHORT, tmp_path / 'run')['step'] == 4
  assert 'curves.png could not be written: Is a directory' in capsys.readouterr().err
