"""figures: the files of a model, and its numbers beside an untrained one's and the paper's."""

import csv

import numpy as np
from PIL import Image

from tests.pretrained.released_layout import google_file
from vit_jax.cli.figures import open_figure_images
from vit_jax.config import ModelConfig


def test_figures_and_numbers_of_a_model_beside_others(command, tmp_path):
  google_file(
    tmp_path / 'model.npz', ModelConfig(variant='mu/8', depth=2), classes=0, size=(32, 32)
  )
  google_file(
    tmp_path / 'other.npz', ModelConfig(variant='mu/8', depth=2), classes=0, size=(32, 32), seed=1
  )
  for i in range(2):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 32, 3), np.uint8)).save(
      tmp_path / f'{i}.png'
    )
  code, out, err = command(
    'figures', '--init', 'model.npz', '--images', '*.png', '--out', 'out', '--beside', 'other.npz'
  )
  # Neither file states its image size. (32 / 8) x (32 / 8) patches.
  assert (code, err.splitlines()) == (
    0,
    [
      f'{name}: the file does not state an image size: its position embeddings are taken for '
      '4x4 patches'
      for name in ('model.npz', 'other.npz')
    ],
  )
  made = {path.name for path in (tmp_path / 'out').iterdir()}
  names = ('filters', 'positions', 'distance', 'rollout')
  assert made >= {f'{name}.png' for name in names} | {'numbers.csv', 'numbers.md', 'distance.csv'}
  head, *rows = csv.reader(
    (tmp_path / 'out' / 'numbers.csv').read_text(encoding='utf-8').splitlines()
  )
  assert head[:6] == ['', 'model.npz', 'untrained', 'other.npz', 'ViT-L/16', 'R50x1+ViT-L/16']
  assert [row[0] for row in rows][:2] == [
    'filters: variance in 28 components',
    'filters: slow waves',
  ]
  assert (tmp_path / 'out' / 'numbers.md').read_text(encoding='utf-8') in out


def test_without_images_a_message_lists_the_missing_figures(command, tmp_path):
  google_file(
    tmp_path / 'model.npz', ModelConfig(variant='mu/8', depth=1), classes=0, size=(32, 32)
  )
  code, _, err = command('figures', '--init', 'model.npz', '--out', 'out')
  assert code == 0
  assert 'without --images' in err
  assert not (tmp_path / 'out' / 'rollout.png').exists()


def test_of_many_images_128_are_used_as_in_the_paper(tmp_path):
  for i in range(300):
    (tmp_path / f'{i:03}.png').touch()
  files = open_figure_images([str(tmp_path)], None)
  assert (len(files), files.paths[0][-7:], files.paths[-1][-7:]) == (128, '000.png', '297.png')
  assert len(open_figure_images(['builtin:digits'], None)) == 128
