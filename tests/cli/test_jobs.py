"""The command line: what a person types wrong gets one line, exit code 2 and nothing written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.cli.jobs import default_workdir

ROOT = Path(__file__).parents[2]

WRONG = {
  'an unknown field': (['--config.optm.lr=3'], "--config.optm.lr is no setting. Did you mean 'config.optim.lr'?"),
  'a value of another type': (['--config.data.batch=x'], "flag --config.data.batch=x: invalid literal for int()"),
  'a config that is not there': (['--config=configs/nope.py'], '--config=configs/nope.py: there is no such file'),
  'a row that the table lacks': (['--config=configs/pretrain.py:B/17,imagenet'], "no such row. Did you mean 'B/16,imagenet'"),
  'an unknown flag': (['--wrkdir=x'], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
  'an unknown data set': (['--config.data.train=builtin:fashon_mnist'], "Did you mean 'fashion_mnist'?"),
  'an unknown variant': (['--config.model.variant=BB/16'], "there is no variant 'BB'. Did you mean 'B'?"),
  'steps and epochs': (['--config.epochs=3'], 'set exactly one of them'),
  'a size that does not divide': (['--config.data.size=30'], 'does not divide into patches'),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_a_mistake_is_one_line_and_exit_code_2(case, tmp_path):
  args, message = WRONG[case]
  command = [sys.executable, 'run_pretrain.py', f'--workdir={tmp_path / "run"}', *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert message in done.stderr
  assert not (tmp_path / 'run').exists()


def test_a_run_is_called_by_its_config_and_its_argument():
  assert re.fullmatch(r'runs/quickstart-\d{8}-\d{6}', default_workdir('configs/quickstart.py'))
  assert re.fullmatch(
    r'runs/finetune-S_14_folder-\d{8}-\d{6}', default_workdir('configs/finetune.py:S/14,folder')
  )


def test_both_jobs_run_from_another_directory(tmp_path):
  """The first run, its result as the second's start, and the second again: it goes on where it was, and has nothing to do."""
  small = ['--config.steps=2', '--config.data.batch=16', '--config.optim.grad_accum_steps=1']
  small += ['--config.optim.warmup=0', '--config.model.depth=1']
  jobs = [
    [
      'run_pretrain.py',
      '--workdir=runs/quickstart-1',
      '--config.data.split=train[:64]',
      '--config.data.eval_split=test[:33]',
    ],
    ['run_finetune.py', '--workdir=tuned', '--config.data.eval_split=test[:33]'],
    ['run_finetune.py', '--workdir=tuned', '--config.data.eval_split=test[:33]'],
  ]
  said = []
  for script, *args in jobs:
    command = [sys.executable, str(ROOT / script), *args, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said.append(done.stderr)
  assert 'starts from runs/quickstart-1 at step 2' in said[1]
  assert 'test_examples 33' in said[1]
  assert 'resumes after step 2' in said[2]
