"""The protocol of VTAB-1k: the recipe of a task, and means as the paper's own figures give them."""

import pytest

from vit_jax.config import ModelConfig, parse_duration
from vit_jax.config_checks import validate
from vit_jax.data.vtab import VTAB_TASKS
from vit_jax.errors import UserError
from vit_jax.evaluate.vtab import check_vtab_data, mean_by_group, vtab_config
from vit_jax.paper.published import read_published_table

MODEL = ModelConfig(variant='mu/4')


def test_the_recipe_is_table_4s_and_the_same_for_all_tasks_but_for_what_would_change_the_label():
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


def test_a_mean_is_of_a_whole_group_or_not_there():
  specialized = {
    'patch_camelyon': 0.8,
    'eurosat': 0.9,
    'resisc45': 0.7,
    'diabetic_retinopathy': 0.8,
  }
  assert mean_by_group(specialized | {'dmlab': 0.1}) == {'specialized': pytest.approx(0.8)}
  assert mean_by_group({'dmlab': 0.1}) == {}


def test_all_that_is_missing_is_said_before_anything_is_trained(tmp_path):
  with pytest.raises(
    UserError, match=r'2 of 2 tasks have no data here \(dmlab, dtd\): .*data prepare dmlab'
  ):
    check_vtab_data(['dmlab', 'dtd'], str(tmp_path))
  with pytest.raises(UserError, match="VTAB has no task 'dmlabs'. Did you mean 'dmlab'"):
    vtab_config('dmlabs', model=MODEL, size=(8, 8))
