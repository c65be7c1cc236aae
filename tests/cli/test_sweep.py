"""The command `sweep`: its grid, what it prints and writes, and what it refuses."""

import argparse
import csv
import json

import pytest

from tests.cli.test_finetune import run_vit_jax
from vit_jax.cli.sweep import default_grid, make_runs, parse_grid, percentage
from vit_jax.errors import UserError

DIGITS = ('--config=mini:ViT-S,digits', '--config.steps=8')


def test_a_sweep_of_a_folder_writes_its_table_and_resumes(photos, tmp_path):
  words = (
    tmp_path, 'sweep', 'photos', '--init', 'model.npz', '--config.steps=4', '--held_out=20%',
    '--grid', 'config.optim.lr=0.0001,0.001',
  )  # fmt: skip
  code, out, err = run_vit_jax(*words)
  assert code == 0, err
  root = tmp_path / 'runs' / 'sweep-photos'
  report = json.loads((root / 'sweep.json').read_text(encoding='utf-8'))
  with (root / 'sweep.csv').open(newline='', encoding='utf-8') as file:
    table = list(csv.DictReader(file))
  assert [row['point'] for row in table] == ['optim.lr=0.0001', 'optim.lr=0.001']
  assert [float(row['accuracy']) for row in table] == [row['accuracy'] for row in report['points']]
  assert [row['chosen'] for row in table].count('True') == 1
  assert report['evaluation']['test_examples'] == 3  # One of ten of each of three classes.
  assert 'vit-jax train --config=finetune:' in out and out.count('chosen') == 1
  config = json.loads((tmp_path / report['directory'] / 'config.json').read_text(encoding='utf-8'))
  assert config['data']['split'] == 'train' and config['steps'] == 4
  code, again, err = run_vit_jax(*words)
  assert code == 0 and again == out and 'linear probe' not in err, err


def test_a_grid_has_settings_with_values():
  grid = parse_grid(['config.optim.lr=0.1,0.2', '--config.data.size=8,8;16,16'], [])
  assert grid == {'optim.lr': ['0.1', '0.2'], 'data.size': ['8,8', '16,16']}


@pytest.mark.parametrize(
  ('texts', 'settings', 'message'),
  [
    (['optim.lr=1'], [], 'expected config.FIELD=VALUE'),
    (['config.optim.lr'], [], 'expected config.FIELD=VALUE'),
    (['config.optim.lx=1'], [], "Did you mean 'config.optim.lr'"),
    (['config.seed=1', 'config.seed=2'], [], 'given twice'),
    (['config.seed=1,2'], ['--config.seed=3'], 'given twice'),
    (['config.seed=1,1'], [], 'a value is given twice'),
    (['config.data.split=train,test'], [], 'the same data'),
  ],
)
def test_a_wrong_grid_is_refused(texts, settings, message):
  with pytest.raises(UserError, match=message):
    parse_grid(texts, settings)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ((), 'sweep needs DATA'),
    (('photos', '--config=finetune'), 'give either DATA or --config'),
    (('photos',), 'needs --init=MODEL'),
    (('--config=finetune', '--init=a'), 'use --config.init'),
    (('--config=finetune', '--time=5m'), '--time is for DATA'),
    (('nowhere', '--init=a'), 'no such folder'),
    (('photos', '--init=a', '--time=5m', '--grid=config.steps=5,9'), '--time chooses the steps'),
    (('--config=finetune', '--held_out=60%'), 'up to 50%'),
  ],
)
def test_flags_that_do_not_go_together_are_refused_before_jax_is_loaded(
  command, photos, words, message
):
  code, _, err = command('sweep', *words)
  assert code == 2 and message in err and err.count('\n') == 1


def test_the_default_grid_has_the_learning_rates_of_table_4():
  rates = {'folder': [0.001, 0.003, 0.01, 0.03], 'imagenet': [0.003, 0.01, 0.03, 0.06]}
  for data, expected in rates.items():
    grid = default_grid([f'--config=finetune:B/16,{data}'])
    assert [*map(float, grid['optim.lr'])] == expected


def test_a_rate_that_is_not_the_recipes_is_the_middle_of_the_default_grid():
  grid = default_grid(['--config=finetune:B/16,folder', '--config.optim.lr=0.0001'])
  assert [*map(float, grid['optim.lr'])] == pytest.approx([3e-5, 1e-4, 3e-4])
  vtab = default_grid(['--config=finetune:B/16,vtab/caltech101'])  # 0.01 in the paper.
  assert [*map(float, vtab['optim.lr'])] == pytest.approx([0.003, 0.01, 0.03])


def test_the_points_of_a_grid_are_all_combinations():
  runs = make_runs([*DIGITS], {'optim.lr': ['0.1', '0.2'], 'data.batch': ['32', '64']})
  assert [(run.settings['optim.lr'], run.build_config().data.batch) for run in runs] == [
    (0.1, 32), (0.1, 64), (0.2, 32), (0.2, 64),
  ]  # fmt: skip
  assert runs[1].row == 'optim.lr=0.1 data.batch=64'
  assert all(run.settings['steps'] == 8 for run in runs)


@pytest.mark.parametrize('text', ['10', '0%', '51%', '%', 'x%', 'nan%', '-1%'])
def test_the_held_out_part_is_a_percentage_up_to_a_half(text):
  with pytest.raises(argparse.ArgumentTypeError):
    percentage(text)
  assert percentage('12.5%') == 12.5
