"""Self-training resumes at the incomplete stage, and ends with the same bits as without a kill."""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ENVIRONMENT, PATIENCE, ROOT, account
from tests.tiny import get_config
from vit_jax.errors import UserError
from vit_jax.settings.fields import with_settings
from vit_jax.train import train
from vit_jax.training import self_training

SETTINGS = {
  'data.split': 'train[:50%]', 'data.unlabelled': 'builtin:digits', 'data.unlabelled_split': 'train[50%:]',
  'data.unlabelled_ratio': 3, 'data.confidence_threshold': 0.1, 'data.unlabelled_per_class': 40, 'data.randaug_ops': 1, 'data.randaug_magnitude': 5.0,
  'steps': 24, 'log_every': '4', 'eval_every': '12', 'save_every': '8',
}  # fmt: skip
STAGES = ['0-teacher', '1-labels', '1-student']


self_train = functools.partial(self_training.self_train, train=train)


def config(**changed):
  """Return the config of tiny.py with labels for half of the digits."""
  return with_settings(get_config(), SETTINGS | changed)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """Return (directory, results) of uninterrupted self-training."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  return workdir, self_train(config(), [config()], workdir)


def files(where) -> dict:
  """Return {path: time of the last write} of all files."""
  return {path: path.stat().st_mtime_ns for path in where.rglob('*') if path.is_file()}


def test_a_killed_student_resumes_and_ends_with_the_same_bits(uninterrupted, tmp_path):
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  command = [
    sys.executable,
    '-u',
    '-m',
    'vit_jax',
    'selftrain',
    '--teacher',
    'tests/tiny.py',
    '--students',
    'tests/tiny.py',
  ]
  with log.open('w') as file:
    process = subprocess.Popen(
      [
        *command,
        f'--workdir={workdir}',
        *[f'--config.{name}={value}' for name, value in SETTINGS.items()],
      ],
      cwd=ROOT,
      env=os.environ | ENVIRONMENT,
      stdout=file,
      stderr=file,
    )
  deadline = time.monotonic() + PATIENCE
  while not (workdir / '1-student' / 'checkpoints' / '8').is_dir():
    assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding='utf-8')[
      -3000:
    ]
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  before = {stage: files(workdir / stage) for stage in STAGES[:2]}
  results = self_train(config(), [config()], workdir)
  assert before == {stage: files(workdir / stage) for stage in STAGES[:2]}
  assert results == uninterrupted[1] and [*results] == STAGES
  for stage in ('0-teacher', '1-student'):
    assert account(workdir / stage) == account(uninterrupted[0] / stage)


def test_another_teacher_is_refused_after_labelling_has_begun(uninterrupted, tmp_path):
  (tmp_path / '1-labels').mkdir()
  (tmp_path / '1-labels' / 'teacher.json').write_text(
    (uninterrupted[0] / '1-labels' / 'teacher.json').read_text(encoding='utf-8'), encoding='utf-8'
  )
  with pytest.raises(UserError, match='1-labels.*teacher.*0-teacher.*runs/b7'):
    self_train('runs/b7', [config()], tmp_path)


def test_a_changed_setting_is_refused_by_name_before_any_stage_runs(uninterrupted):
  with pytest.raises(UserError, match='1-student.*label_smoothing'):
    self_train(config(), [config(label_smoothing=0.1)], uninterrupted[0])
  with pytest.raises(UserError, match='0-teacher.*seed'):
    self_train(config(seed=1), [config(seed=1)], uninterrupted[0])
  student = config(**{'data.unlabelled_split': 'train[60%:]'})
  with pytest.raises(
    UserError,
    match=r'1-labels.*unlabelled_split',
  ):
    self_train(config(), [student], uninterrupted[0])


def test_a_missing_stage_is_an_error_if_a_later_stage_exists(tmp_path):
  (tmp_path / '1-student').mkdir()
  with pytest.raises(UserError, match='1-student .*0-teacher'):
    self_train(config(), [config()], tmp_path)


def test_a_student_is_the_next_teacher_and_earlier_stages_do_not_change(uninterrupted):
  workdir, first = uninterrupted
  before = {stage: files(workdir / stage) for stage in STAGES}
  results = self_train(config(), [config(), config(steps=9)], workdir)
  assert before == {stage: files(workdir / stage) for stage in STAGES}
  assert [*results] == [*STAGES, '2-labels', '2-student'] and {
    name: results[name] for name in STAGES
  } == first
  assert '"teacher": "1-student"' in (workdir / '2-labels' / 'teacher.json').read_text(
    encoding='utf-8'
  )


def test_a_student_without_unlabelled_images_is_refused(tmp_path):
  student = config(**{'data.unlabelled': ''})
  with pytest.raises(UserError, match='student 1.*data.unlabelled'):
    self_train('runs/teacher', [student], tmp_path)
