"""The command `tables`: the list, dry runs, miniatures and released checkpoints."""

import re
from pathlib import Path

import pytest

from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.paper.mini import MINI_EXPERIMENTS, SWEEP
from vit_jax.paper.runner import read_records_csv

# A model of two steps in place of B/16, on digits in place of CIFAR-10.
TINY = (
  *(
    '--config.model.width=32',
    '--config.model.depth=1',
    '--config.model.mlp=64',
    '--config.model.heads=2',
    '--config.steps=2',
  ),
  *(
    '--config.data.train=builtin:digits',
    '--config.data.split=train[:200]',
    '--config.data.eval_split=test[:40]',
  ),
  *(
    '--config.data.size=32,32',
    '--config.data.batch=8',
    '--config.data.eval_batch=40',
    '--config.data.workers=0',
  ),
  *('--config.optim.warmup=0', '--config.model.dtype=float32'),
)


def test_the_list_has_a_paragraph_for_each(command):
  code, out, err = command('tables')
  assert (code, err) == (0, '') and out == command('tables', '--list')[1]
  assert re.search(
    r'Table 5 .*\n +python -m vit_jax tables 5\n +needs .*tfds:cifar10.*\n +.*in miniature.*not '
    r'reproducible outside Google',
    out,
  )
  assert re.search(r'Figure 14 .*\n +python -m vit_jax figures', out)


def test_a_dry_run_prints_commands_hours_and_data(command):
  code, out, _ = command(
    'tables', 'fig9', '--scale=full', '--dry_run', '--standin', '--mfu', '50', '--chip', 'v5p'
  )
  assert code == 0 and 'JFT' not in out
  assert '--config=configs/pretrain.py:B/32,jft --config.probes=fewshot:tfds:imagenet2012' in out
  assert (
    '--config.data.train=folder:imagenet21k' in out
    and 'needs folder:imagenet21k, tfds:imagenet2012' in out
  )
  assert re.search(
    r'3 runs, [\d,]+ exaFLOPs, [\d,]+ chip-hours of v5p at 50 % of its peak \(an estimate\)', out
  )


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (('99',), 'tables 99'),
    (('3',), 'configs/pretrain.py:VARIANT,DATA'),
    (('fig8', '--scale=mini'), 'Figure 8'),
    (('7', '--from_released'), '--from_released'),
    (('5', '--from_released', '--only', 'B/17,cifar10'), "'B/17'"),
    (('mini', '--photos', 'photos'), '--photos=photos'),
    (('5', '--dry_run', '--plan', 'none.json'), '--plan none.json'),
    (('mini', '--effort=21'), 'above 0 and at most 20'),
    (('mini', '--effort=0'), 'above 0 and at most 20'),
    (('mini', '--cifar10=folder:absent'), 'absent'),
  ],
)
def test_a_table_that_cannot_be_made_is_an_error(command, args, words):
  code, _, err = command('tables', *args)
  assert code == 2 and words in err


@pytest.mark.parametrize(
  ('name', 'experiments'),
  [
    ('selfsupervision', (SWEEP, 'masked_patches')),
    pytest.param('mini', tuple(MINI_EXPERIMENTS), marks=pytest.mark.slow),
  ],
)
def test_experiments_run_in_miniature_and_the_page_shows_them(command, tmp_path, name, experiments):
  data = ('--cifar10=builtin:digits', '--fashion_mnist=builtin:digits')
  code, _, err = command(
    *('tables', name, '--scale=mini', '--effort=0.001', '--seeds=1', '--runs=1', '--root=runs'),
    *data,
  )
  assert code == 0, err
  results = tmp_path / 'runs' / 'results'  # A test does not write to the real results.
  page = (results / 'README.md').read_text(encoding='utf-8')
  for each in experiments:
    (row, *_) = read_records_csv(results / f'mini_{each}.csv')
    assert 0 <= float(row['value']) <= 1 and (tmp_path / 'runs' / row['digest']).is_dir()
    assert f'mini_{each}.png' in page and (results / f'mini_{each}.png').is_file()
  assert 'not run' in page


def test_a_dry_run_of_the_miniatures_lists_one_seed_after_the_other(command):
  code, out, _ = command('tables', 'mini', '--dry_run', '--photos=folder:photos')
  *lines, total = out.splitlines()
  seeds = [re.search(r'seed (\d)', line)[1] for line in lines]
  assert code == 0 and seeds == sorted(seeds) and {*seeds} == {'0', '1', '2'}
  assert 'learning_rates: ViT-S, 0.001' in lines[0]
  assert 5 < float(re.search(r'([\d.]+) hours of two CPU cores', total)[1]) < 8


def test_a_released_checkpoint_is_fine_tuned_and_stands_beside_the_published_numbers(
  command, tmp_path
):
  shape = {'width': 32, 'depth': 1, 'mlp': 64, 'heads': 2}
  google_file(tmp_path / 'B_16.npz', ModelConfig(variant='B/16', **shape), classes=5, size=(32, 32))
  said = ('--from_released', '--only', 'B/16,cifar10', '--seeds=2', '--config.init=B_16.npz', *TINY)
  code, out, err = command('tables', '5', *said, '--out=results')
  assert code == 0, err
  assert re.search(r'\| B/16, CIFAR-10 \| 98.95 \| 99.02 \| \d+\.\d ± \d+\.\d \|', out)
  assert {row['seed'] for row in read_records_csv(Path('results') / '5_from_released.csv')} == {
    '0',
    '1',
  }
  code, out, _ = command('tables', '5', *said, '--dry_run')
  assert len(out.splitlines()) == 2 and out.startswith(
    'python -m vit_jax train --config=configs/finetune.py:B/16,cifar10'
  )


def test_speed_and_largest_batch_are_measured(command):
  code, out, err = command(
    'tables', 'fig12', '--only', 'mu/16', '--sizes', '32', '--largest', '2', '--dtype', 'float32'
  )
  assert (code, err) == (0, '')
  assert re.search(r'mu/16 +32 px +[\d,]+\.\d +2\n', out)
