"""VTAB-1k: the config of each task, and the means of the paper's own table."""

import pytest

from vit_jax.config import ModelConfig
from vit_jax.config_checks import validate
from vit_jax.data.vtab import VTAB_TASKS
from vit_jax.errors import UserError
from vit_jax.evaluate.vtab import check_vtab_data, mean_by_group, vtab_config
from vit_jax.optim.durations import parse_duration
from vit_jax.paper.published import read_published_table

MODEL = ModelConfig(variant='mu/4')


def test_all_tasks_have_the_config_of_table_4_except_for_label_changing_augmentations():
  recipes = {task: validate(vtab_config(task, model=MODEL, size=(384, 384))) for task in VTAB_TASKS}
  for task, config in recipes.items():
    assert (config.steps, config.optim.lr, config.data.batch, config.optim.name) == (
      2500,
      0.01,
      512,
      'sgd',
    )
    assert parse_duration(config.optim.warmup, name='warmup', steps=2500, epoch=2) == 500
    assert (config.data.train, config.data.split, config.data.eval_split) == (
      f'vtab:{task}',
      'train+val',
      'test',
    )
  still = lambda name, value: {
    task for task, config in recipes.items() if getattr(config.data, name) == value
  }
  assert still('flip', False) == {'dsprites_orientation', 'smallnorb_azimuth', 'dsprites_location'}
  assert still('crop', 'resize') == {
    'clevr_count',
    'clevr_distance',
    'dmlab',
    'kitti_distance',
    'dsprites_location',
  }


@pytest.mark.parametrize('model', ['ViT-H/14 (JFT)', 'ViT-L/16 (JFT)', 'ViT-L/16 (I21k)'])
def test_the_means_of_the_papers_table_9_are_the_papers(model):
  rows = {row['Task']: float(row[model]) for row in read_published_table('table9')}
  found = mean_by_group({task: rows[facts.title] for task, facts in VTAB_TASKS.items()})
  assert found['all'] == pytest.approx(rows['Mean'], abs=0.06)
  groups = {
    'ViT-H/14 (JFT)': (86.69, 87.00, 65.03),
    'ViT-L/16 (JFT)': (85.56, 86.72, 62.96),
    'ViT-L/16 (I21k)': (83.27, 84.65, 57.50),
  }
  assert (found['natural'], found['specialized'], found['structured']) == pytest.approx(
    groups[model], abs=0.006
  )


def test_a_group_without_all_its_tasks_has_no_mean():
  specialized = {
    'patch_camelyon': 0.8,
    'eurosat': 0.9,
    'resisc45': 0.7,
    'diabetic_retinopathy': 0.8,
  }
  assert mean_by_group(specialized | {'dmlab': 0.1}) == {'specialized': pytest.approx(0.8)}
  assert mean_by_group({'dmlab': 0.1}) == {}


def test_missing_data_of_all_tasks_are_one_user_error(tmp_path):
  with pytest.raises(UserError, match=r'dmlab, dtd.*data prepare dmlab'):
    check_vtab_data(['dmlab', 'dtd'], str(tmp_path))
  with pytest.raises(UserError, match="'dmlabs'.*'dmlab'"):
    vtab_config('dmlabs', model=MODEL, size=(8, 8))
