"""Find the recipes of configs/ by name, in a checkout and in an installed wheel."""

import functools
import importlib.util
import inspect
import os
import types
from collections.abc import Iterable
from pathlib import Path

from vit_jax.config import Config
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.fields import flatten_config

_PACKAGE = Path(__file__).parent
# An installed wheel holds the recipes as vit_jax/configs, a checkout beside vit_jax.
_RECIPE_DIRS = (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')


def recipes_dir() -> Path:
  """Return the directory of the recipes that come with the package.

  Raises UserError if there is none.
  """
  for path in _RECIPE_DIRS:
    if (path / 'quickstart.py').is_file():
      return path
  raise UserError(f'the recipes are missing: neither {" nor ".join(map(str, _RECIPE_DIRS))} exists')


def find_recipe(name: str) -> Path:
  """Return the file of a recipe: 'quickstart', 'finetune:B/16,cifar10', 'configs/finetune.py'.

  `name` may end in '.py', contain a directory, and be followed by ':ARGUMENT', which is ignored. A
  bare name means a recipe of the package. A path means that file, and 'configs/NAME.py' the recipe
  of the package if the current directory has no such file.

  Raises UserError if no such recipe exists.
  """
  text = name.partition(':')[0]
  path = Path(text if text.endswith('.py') else f'{text}.py')
  candidates = [path]
  if path.parent in (Path(), Path('configs')):
    shipped = recipes_dir() / path.name
    candidates = [shipped, path] if path.parent == Path() and text != path.name else [path, shipped]
  for candidate in candidates:
    if text and os.path.isfile(candidate):  # noqa: PTH113, Path's raises for a long name.
      return candidate
  recipes = sorted(file.stem for file in recipes_dir().glob('*.py') if file.stem != '__init__')
  raise UserError(f'--config={name}: there is no such recipe.{did_you_mean(path.stem, recipes)}')


def is_recipe(name: str) -> bool:
  """Return whether `name` is a '.py' file or a recipe of the package; ':ARGUMENT' is ignored."""
  text = name.partition(':')[0]
  path = recipes_dir() / f'{text.removeprefix("configs/")}.py'
  return text.endswith('.py') or os.path.isfile(path)  # noqa: PTH113


def import_recipe(name: str) -> types.ModuleType:
  """Import the module of a recipe.

  Raises UserError if no such recipe exists.
  """
  return _import_file(find_recipe(name).absolute())


@functools.cache
def _import_file(path: Path) -> types.ModuleType:
  """Import a Python file that is not a part of a package."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  return module


def load_recipe(name: str) -> Config:
  """Return the config of a recipe NAME or NAME:ARGUMENT.

  Raises UserError if no such recipe exists, or if it does not take the argument.
  """
  _, colon, argument = name.partition(':')
  get_config = import_recipe(name).get_config
  if colon and not inspect.signature(get_config).parameters:
    raise UserError(f'--config={name}: this recipe takes no argument')
  return get_config(argument) if colon else get_config()


def load_sweep_rates(name: str) -> tuple[float, ...]:
  """Return the learning rates that a recipe NAME:ARGUMENT lists to choose from, or ()."""
  _, colon, argument = name.partition(':')
  sweep_rates = vars(import_recipe(name)).get('sweep_rates', lambda argument='': ())
  return sweep_rates(argument) if colon else sweep_rates()


def check_data_set(data: str, known: Iterable[str], *, recipe: str, argument: str):
  """Raise UserError unless `data`, the second part of a recipe's argument, is one of `known`."""
  known = list(known)
  if not data:
    variant = argument.partition(',')[0]
    raise UserError(
      f'--config={recipe}:{argument} names no data set; write --config={recipe}:{variant},DATA. '
      f'Known: {", ".join(known)}'
    )
  if data not in known:
    near = did_you_mean(data, known)
    raise UserError(f'--config={recipe}:{argument}: unknown data set {data!r}.{near}')


def differences_from_recipe(settings: dict[str, object], recipe: str) -> dict[str, object]:
  """Return the settings whose values are not the recipe's."""
  defaults = flatten_config(load_recipe(recipe))
  return {name: value for name, value in settings.items() if value != defaults[name]}


def format_flags(settings: dict[str, object]) -> list[str]:
  """Return settings as flags, such as --config.data.size=140,140."""

  def text(value) -> str:
    if isinstance(value, tuple):
      return ','.join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

  return [f'--config.{name}={text(value)}' for name, value in settings.items()]
