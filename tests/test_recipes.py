"""Recipes are found by name from any directory."""

import pytest

from vit_jax.errors import UserError
from vit_jax.recipes import find_recipe, is_recipe, load_recipe, recipes_dir


@pytest.mark.parametrize(
  'name',
  [
    'finetune',
    'finetune.py',
    'configs/finetune',
    'configs/finetune.py',
    'finetune:B/16,cifar10',
    'configs/finetune.py:B/16,vtab/caltech101',
  ],
)
def test_a_recipe_of_the_package_is_found_from_any_directory(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert find_recipe(name) == recipes_dir() / 'finetune.py'


def test_a_path_is_preferred_to_a_recipe_of_the_package_and_a_bare_name_is_not(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for path in ('configs/finetune.py', 'finetune.py', 'mine.py'):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
  assert find_recipe('configs/finetune.py:B/16').resolve() == tmp_path / 'configs' / 'finetune.py'
  assert find_recipe('finetune.py').resolve() == tmp_path / 'finetune.py'
  assert find_recipe('finetune') == recipes_dir() / 'finetune.py'
  assert find_recipe('mine').resolve() == tmp_path / 'mine.py'


@pytest.mark.parametrize('name', ['finetun', 'elsewhere/finetune.py', '/finetune.py', '', ':B/16'])
def test_a_recipe_that_does_not_exist_is_an_error_that_names_it(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError) as error:
    find_recipe(name)
  assert f'--config={name}:' in str(error.value)


def test_a_model_is_not_a_recipe():
  assert is_recipe('noisy_student:B7') and is_recipe('my/own.py') and is_recipe('configs/mini')
  assert not is_recipe('B/16') and not is_recipe('runs/b7') and not is_recipe('model.npz')


def test_the_argument_of_a_recipe_is_everything_after_the_first_colon(tmp_path):
  (tmp_path / 'mine.py').write_text(
    'def get_config(argument=None):\n  return argument\n', encoding='utf-8'
  )
  assert load_recipe(f'{tmp_path}/mine.py:a:b') == 'a:b'
  assert load_recipe(f'{tmp_path}/mine') is None


def test_an_argument_for_a_recipe_without_one_is_an_error():
  with pytest.raises(UserError, match='quickstart:x'):
    load_recipe('quickstart:x')


@pytest.mark.parametrize('recipe', ['finetune', 'bit_finetune', 'bit_pretrain', 'self_supervised'])
def test_a_recipe_without_its_data_set_says_how_to_name_one(recipe):
  with pytest.raises(UserError) as error:
    load_recipe(f'{recipe}:S/16')
  assert f'write --config={recipe}:S/16,DATA' in str(error.value)
  with pytest.raises(UserError) as error:
    load_recipe(f'{recipe}:S/16,imagenett')
  assert "'imagenett'" in str(error.value)
