"""The command `finetune`: what it trains, what it prints, and what it refuses."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests.runs import ENVIRONMENT, ROOT
from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.cli.arguments import Parser, duration
from vit_jax.errors import UserError
from vit_jax.launch.local import free_port, host_environment
from vit_jax.recipes import format_flags


def start_vit_jax(folder, *words: str, environment: dict[str, str]) -> subprocess.Popen:
  paths = f'{ROOT}{os.pathsep}{ENVIRONMENT["PYTHONPATH"]}'
  return subprocess.Popen(
    [sys.executable, '-m', 'vit_jax', *words],
    cwd=folder,
    env=os.environ | ENVIRONMENT | {'PYTHONPATH': paths} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    encoding='utf-8',
  )


def run_vit_jax(folder, *words: str) -> tuple[int, str, str]:
  """Run a command in a new process, because jobs install signal handlers.

  Return (exit code, stdout, stderr).
  """
  one_device = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  process = start_vit_jax(folder, *words, environment=one_device)
  out, err = process.communicate()
  return process.returncode, out, err


def last_evaluation(workdir) -> dict:
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  records = [json.loads(line) for line in lines]
  return [record for record in records if record['kind'] == 'eval'][-1]


def test_the_printed_command_trains_the_same_model(photos, tmp_path):
  code, out, err = run_vit_jax(
    tmp_path, 'finetune', 'photos', '--init', 'model.npz', '--workdir', 'a', '--config.steps=4',
  )  # fmt: skip
  assert code == 0, err
  assert 'linear probe' in err and 'measuring the time' not in err
  (line,) = [line for line in out.splitlines() if 'vit-jax train' in line]
  program, *words = shlex.split(line)
  assert program == 'vit-jax' and '--workdir=a' in words
  words[words.index('--workdir=a')] = '--workdir=b'
  assert run_vit_jax(tmp_path, *words)[0] == 0
  first, second = (last_evaluation(tmp_path / name) for name in 'ab')
  assert first['test_loss'] == second['test_loss'] and first['step'] == second['step'] == 4
  assert first['test_accuracy'] > 0.5  # Colors, of which a third are guessed.
  assert 'vit-jax predict --init a' in out


def test_adapters_train_and_an_interrupted_run_ends_with_the_same_bits(photos, tmp_path):
  words = (
    'finetune', 'photos', '--init', 'model.npz', '--lora=2', '--config.steps=4',
    '--config.save_every=2', '--workdir',
  )  # fmt: skip
  code, out, err = run_vit_jax(tmp_path, *words, 'a')
  assert code == 0, err
  assert 'it and adapters of rank 2' in out and '--config.lora.rank=2' in out
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  shutil.rmtree(tmp_path / 'b/checkpoints/4')
  code, _, err = run_vit_jax(tmp_path, *words, 'b')
  assert code == 0, err
  (first, _), (second, _) = (load_newest_params(tmp_path / name) for name in 'ab')
  jax.tree.map(np.testing.assert_array_equal, first, second)
  kernel = first['Transformer']['encoderblock']['MultiHeadDotProductAttention_1']['query']
  assert np.abs(kernel['lora_b']).max() > 0


def test_the_number_of_steps_follows_from_the_time(photos, tmp_path):
  """An hour is more than 30 epochs of one batch take."""
  words = (
    tmp_path, 'finetune', 'photos', '--init', 'model.npz', '--workdir', 'a', '--time', '1h',
    '--config.data.batch=27',
  )  # fmt: skip
  code, out, err = run_vit_jax(*words)
  assert code == 0, err
  assert '30 steps of 27 images' in out and 'measuring the time of a step' in err
  assert last_evaluation(tmp_path / 'a')['step'] == 30
  # The same command resumes the run, with the steps that it recorded.
  code, out, err = run_vit_jax(*words)
  assert code == 0, err
  assert '30 steps of 27 images' in out and 'measuring the time of a step' not in err


def test_only_host_0_prints_the_plan_and_the_batch_is_a_multiple_of_the_devices(photos, tmp_path):
  words = (
    'finetune', 'photos', '--init', 'model.npz', '--workdir', 'a', '--config.steps=2',
  )  # fmt: skip
  coordinator = f'localhost:{free_port()}'
  hosts = [
    start_vit_jax(tmp_path, *words, environment=host_environment(coordinator, 2, i, devices=3))
    for i in range(2)
  ]
  with ThreadPoolExecutor() as pool:  # Both at once: a full pipe would stop a host.
    (out, err), (other_out, other_err) = pool.map(lambda host: host.communicate(), hosts)
  assert [host.returncode for host in hosts] == [0, 0], err + other_err
  # 20 images, and 25 for evaluation, are no multiples of six devices.
  assert '2 steps of 18 images' in out and '--config.data.eval_batch=24' in out
  assert 'vit-jax predict' in out and 'fitting a linear probe' in err
  assert all(line.startswith('[Gloo]') for line in other_out.splitlines())  # JAX's own.
  assert 'model.npz' not in other_err and 'probe' not in other_err


def test_a_time_that_is_too_short_says_how_much_is_needed(photos, tmp_path):
  code, _, err = run_vit_jax(tmp_path, 'finetune', 'photos', '--init', 'model.npz', '--time', '1s')
  assert code == 2
  last = err.splitlines()[-1]
  assert last.startswith('error: --time: 1 s are too short for 20 steps of') and 'allow' in last


def test_one_class_is_refused(command, photos):
  for name in ('green', 'blue'):
    for path in (photos / name).iterdir():
      path.unlink()
    (photos / name).rmdir()
  code, _, err = command('finetune', 'photos', '--init', 'model.npz')
  assert code == 2 and 'photos has only one class (red); a classifier needs two' in err


def test_data_that_do_not_exist_are_refused_before_jax_is_loaded(command, tmp_path):
  code, _, err = command('finetune', 'nowhere', '--init', 'model.npz')
  assert code == 2 and err.startswith('error: nowhere: there is no such folder or .csv file')


def test_a_time_beside_a_number_of_steps_is_refused(command, photos):
  code, _, err = command('finetune', 'photos', '--init', 'a', '--time', '5m', '--config.steps=9')
  assert code == 2 and err.startswith('error: --time chooses the steps')


def test_flags_have_the_form_of_the_command_line():
  mean = (122.7709383, 116.7460125, 104.0937375)  # CLIP's: no digit may be lost.
  settings = {
    'data.size': (140, 140), 'data.flip': True, 'optim.lr': 1e-4, 'loss': 'softmax',
    'model.mean': mean,
  }  # fmt: skip
  assert format_flags(settings) == [
    '--config.data.size=140,140', '--config.data.flip=true', '--config.optim.lr=0.0001',
    '--config.loss=softmax', '--config.model.mean=122.7709383,116.7460125,104.0937375',
  ]  # fmt: skip


@pytest.mark.parametrize(('text', 'seconds'), [('90s', 90), ('5m', 300), ('1.5h', 5400)])
def test_a_duration_has_a_unit(text, seconds):
  assert duration(text) == seconds


@pytest.mark.parametrize('text', ['', '5', 'm', '-1m', '0s', '5d', 'nans', '5 minutes'])
def test_a_duration_without_a_unit_or_above_zero_is_refused(text):
  parser = Parser()
  parser.add_argument('--time', type=duration)
  with pytest.raises(UserError, match='is not a time such as 90s, 5m or 2h'):
    parser.parse_args([f'--time={text}'])
