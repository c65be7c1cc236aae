"""The training command: mistakes are one line with exit code 2, and nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.cli.jobs import default_workdir, parse_config_flags, run_and_report_errors
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]

# A command line, and the text that its error must contain.
WRONG = {
  'an unknown field': ('--config.optm.lr=3', 'config.optim.lr'),
  'a value of another type': ('--config.data.batch=x', '--config.data.batch'),
  'a recipe that does not exist': ('--config=configs/nope.py', 'configs/nope.py'),
  'a row that the table lacks': ('--config=pretrain:B/17,imagenet', 'B/16,imagenet'),
  'an unknown flag': ('--wrkdir=x', 'workdir'),
  'an unknown data set': ('--config.data.train=builtin:fashon_mnist', 'fashion_mnist'),
  'an unknown variant': ('--config.model.variant=BB/16', "'BB'"),
  'steps and epochs': ('--config.epochs=3', 'epochs=3'),
  'a size that does not divide': ('--config.data.size=30', '30'),
  'a setting that is a flag of another name': ('--config.optim.accumulate=4', 'grad_accum_steps'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_mistake_is_one_line_and_exit_code_2(case, tmp_path):
  flag, name = WRONG[case]
  command = [sys.executable, 'run_pretrain.py', f'--workdir={tmp_path / "run"}', flag]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  *before, error = done.stderr.splitlines()
  # Data and models are checked after JAX was loaded, which the first line announces.
  assert before in ([], ['waiting for JAX to load and find its devices'])
  assert error.startswith('error: ') and name in error
  assert not (tmp_path / 'run').exists()


def test_default_workdir_is_named_after_the_recipe_and_its_argument():
  assert re.fullmatch(r'runs/quickstart-\d{8}-\d{6}', default_workdir('configs/quickstart.py'))
  assert re.fullmatch(
    r'runs/finetune-S_14_folder-\d{8}-\d{6}', default_workdir('finetune:S/14,folder')
  )


def test_config_flags_take_values_after_a_space_or_an_equals_sign():
  args = ['--config', 'finetune:B/16,cifar10', '--config.data.batch', '64', '--config.seed=3']
  config = parse_config_flags([*args, '--noconfig.data.flip', '--config.init=a.npz'])
  assert (config.model.variant, config.data.train) == ('B/16', 'tfds:cifar10')
  assert (config.data.batch, config.seed, config.data.flip) == (64, 3, False)


def test_the_last_recipe_wins_and_without_one_the_default_is_used():
  args = ['--config=pretrain:L/16,jft', '--config=finetune:B/32,cifar10']
  assert parse_config_flags(args, default='quickstart').model.variant == 'B/32'
  assert parse_config_flags(['--config.seed=1'], default='quickstart').model.variant == 'Ti/7'


@pytest.mark.parametrize('args', [(), ('--config.seed=1',), ('--config=quickstart', 'stray')])
def test_flags_without_a_recipe_or_with_a_stray_argument_are_an_error(args):
  with pytest.raises(UserError):
    parse_config_flags(args)


def test_first_line_of_a_run_appears_before_jax_is_imported():
  code = """
import sys
from vit_jax.cli import jobs, train
jobs.print_stderr = lambda text: sys.exit(f'{"jax" in sys.modules or "numpy" in sys.modules} {text}')
sys.argv = ['run_pretrain.py']
train.run_train_job('quickstart')
"""
  command = [sys.executable, '-c', code]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert re.fullmatch(r'False waiting for .*JAX.*\n', done.stderr)


def test_both_jobs_run_from_another_directory_without_messages_of_libraries(tmp_path):
  """Pre-train, fine-tune from that run, and repeat the second command, which has nothing to do."""
  small = ['--config.steps=2', '--config.data.batch=16', '--config.optim.grad_accum_steps=1']
  small += ['--config.optim.warmup=0', '--config.model.depth=1']
  small += ['--config.data.eval_split=test[:33]']
  jobs = [
    ['run_pretrain.py', '--workdir=runs/quickstart-1', '--config.data.split=train[:64]'],
    ['run_finetune.py', '--workdir=tuned'],
    ['run_finetune.py', '--workdir=tuned'],
  ]
  outputs = []
  for script, *args in jobs:
    command = [sys.executable, str(ROOT / script), *args, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs.append(done.stderr)
  assert 'runs/quickstart-1' in outputs[1] and 'test_examples 33' in outputs[1]
  assert 'resumes after step 2' in outputs[2]
  for output in outputs:
    assert 'backend' not in output and not re.search(r'^[IWEF]\d{4} ', output, re.MULTILINE)


@pytest.mark.parametrize(
  'flag', ['--config.a b=1', "--config.'x'=1", '--config.a\n=1', '--config.=1']
)
def test_a_setting_with_an_impossible_name_is_an_error(flag):
  with pytest.raises(UserError, match='is not a setting'):
    parse_config_flags(['--config=configs/quickstart.py', flag])


def test_a_misspelled_setting_is_found_before_a_value_with_a_newline():
  with pytest.raises(UserError, match="Did you mean 'config.data.train'"):
    parse_config_flags(['--config=configs/quickstart.py', '--config.data.trian=a\nb'])


def test_the_name_of_a_recipe_may_be_too_long_for_a_file():
  with pytest.raises(UserError, match='there is no such recipe'):
    parse_config_flags([f'--config={"x" * 300}'])


def test_errors_do_not_show_passwords_in_urls(capsys):
  def fail():
    raise UserError('config.init=https://ann:s3cret@example.com/vit.npz was trained otherwise')

  with pytest.raises(SystemExit):
    run_and_report_errors(fail)
  err = capsys.readouterr().err
  assert 'config.init=https://***@example.com/vit.npz' in err and 's3cret' not in err
