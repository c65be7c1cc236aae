"""evaluate --protocol vtab: fine-tuning on the thousand images of a task."""

import json

import numpy as np
import tensorflow_datasets as tfds

from tests.pretrained.released_layout import google_file
from vit_jax.checkpoint.run_directory import read_run_config
from vit_jax.config import ModelConfig
from vit_jax.data.sources import open_source


def test_a_task_is_fine_tuned_once(command, tmp_path, write_tfds, png):
  digits = {split: open_source('builtin:digits', split) for split in ('train', 'test')}
  example = lambda source, i: {
    'image': png(np.asarray(source[i % len(source)][0])),
    'label': source[i % len(source)][1][0],
  }
  sizes = {'train': ('train', 800), 'validation': ('train', 200), 'test': ('test', 50)}
  splits = {split: [example(digits[of], i) for i in range(n)] for split, (of, n) in sizes.items()}
  features = {
    'image': tfds.features.Image(shape=(8, 8, 1)),
    'label': tfds.features.ClassLabel(num_classes=10),
  }
  write_tfds('patch_camelyon', tmp_path / 'sets', features, splits)
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/4', depth=1), classes=0, size=(8, 8))
  asked = (
    'evaluate',
    '--init',
    'model.npz',
    '--protocol',
    'vtab',
    '--tasks',
    'patch_camelyon',
    '--dir',
    'sets',
    '--workdir',
    'runs',
  )
  asked = (*asked, '--steps', '6', '--train_batch', '16', '--batch', '16', '--json', 'out.json')
  code, out, err = command(*asked)
  assert code == 0, err
  found = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))
  assert found['tasks']['patch_camelyon']['examples'] == 50
  assert f'Camelyon  specialized  {found["tasks"]["patch_camelyon"]["accuracy"]:8.2%}' in out
  assert found['means'] == {}  # No group is complete.
  config = read_run_config(tmp_path / 'runs' / 'patch_camelyon')
  assert (config.data.train, config.data.split, config.steps, config.init) == (
    'vtab:patch_camelyon',
    'train+val',
    6,
    'model.npz',
  )
  steps = (tmp_path / 'runs' / 'patch_camelyon' / 'metrics.jsonl').read_text(encoding='utf-8')
  assert command(*asked)[0] == 0
  assert (tmp_path / 'runs' / 'patch_camelyon' / 'metrics.jsonl').read_text(
    encoding='utf-8'
  ) == steps
  assert json.loads((tmp_path / 'out.json').read_text(encoding='utf-8')) == found
