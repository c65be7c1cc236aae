"""A run describes itself, and another one in its directory is refused by the fields that differ."""

import json

import jax
import pytest

from vit_jax.checkpoint.run_directory import (
  read_run_config,
  read_run_labels,
  read_run_preprocessing,
  write_run_description,
)
from vit_jax.config import Config
from vit_jax.errors import UserError


def test_a_run_describes_itself(tmp_path):
  config = Config(steps=5)
  write_run_description(tmp_path, config, ('cat', 'dog'))
  assert read_run_config(tmp_path) == config
  assert read_run_labels(tmp_path) == ('cat', 'dog')
  preprocessing = json.loads((tmp_path / 'preprocessing.json').read_text())
  assert preprocessing['size'] == [224, 224] and preprocessing['mean'] == [127.5] * 3
  assert json.loads((tmp_path / 'versions.json').read_text())['jax'] == jax.__version__


def test_another_run_in_the_directory_is_refused_with_the_fields_that_differ(tmp_path):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  other = Config(steps=6, log_every='1')  # How often it logs is free to change.
  with pytest.raises(UserError, match='differ in steps: 5 there, 6 here$'):
    write_run_description(tmp_path, other, ('cat', 'dog'))
  with pytest.raises(UserError, match='other classes'):
    write_run_description(tmp_path, Config(steps=5), ('cat', 'cow'))
  write_run_description(tmp_path, Config(steps=5, log_every='1'), ('cat', 'dog'))


def test_other_data_are_refused_with_the_facts_that_differ_until_the_file_that_tells_is_removed(
  tmp_path,
):
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 800, 'order': 1}
  )
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 800, 'order': 1}
  )
  with pytest.raises(
    UserError,
    match='holds a run on other data .*: train.examples: 800 there, 801 here. Choose another',
  ):
    write_run_description(
      tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 801, 'order': 1}
    )
  (tmp_path / 'data.json').unlink()
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 801, 'order': 1}
  )
  assert json.loads((tmp_path / 'data.json').read_text()) == {'train.examples': 801, 'order': 1}


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='can not write to .*choose another --workdir'):
    write_run_description(tmp_path / 'file' / 'run', Config(steps=5), ('cat',))


def test_a_directory_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='no run directory'):
    read_run_config(tmp_path)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('steps', '12', "config.steps='12': expected a whole number"),
    ('steps', True, 'config.steps=True: expected a whole number'),
    ('seed', None, 'config.seed=None: expected a whole number'),
    ('mixup', 'x', "config.mixup='x': expected a number"),
    ('data', 3, 'a config is a table of settings, not 3'),
    ('step', 3, "config field 'step' is unknown. Did you mean 'steps'"),
  ],
)
def test_a_config_that_was_changed_by_hand_is_refused_by_field(tmp_path, field, value, message):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  content = json.loads((tmp_path / 'config.json').read_text()) | {field: value}
  (tmp_path / 'config.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=f'config.json: {message}'):
    read_run_config(tmp_path)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('size', [8]),
    ('size', 'large'),
    ('crop', 'none'),
    ('short_side', 1.5),
    ('mean', [1, 2]),
    ('more', 1),
  ],
)
def test_preprocessing_that_no_run_writes_is_refused(tmp_path, field, value):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  assert read_run_preprocessing(tmp_path)['size'] == (224, 224)
  content = json.loads((tmp_path / 'preprocessing.json').read_text()) | {field: value}
  (tmp_path / 'preprocessing.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=f'preprocessing.json: {field} is'):
    read_run_preprocessing(tmp_path)
