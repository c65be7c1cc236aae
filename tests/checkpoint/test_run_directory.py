"""The files of a run directory, and errors that name the fields in which another run differs."""

import dataclasses
import json

import jax
import pytest

from vit_jax.checkpoint.run_directory import (
  adopt_unrecorded_settings,
  check_same_run,
  read_run_config,
  read_run_labels,
  read_run_preprocessing,
  write_run_description,
)
from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError
from vit_jax.settings.fields import config_to_dict


def test_config_labels_preprocessing_and_versions_are_written(tmp_path):
  config = Config(steps=5)
  write_run_description(tmp_path, config, ('cat', 'dog'))
  assert read_run_config(tmp_path) == config
  assert read_run_labels(tmp_path) == ('cat', 'dog')
  preprocessing = json.loads((tmp_path / 'preprocessing.json').read_text(encoding='utf-8'))
  assert preprocessing['size'] == [224, 224] and preprocessing['mean'] == [127.5] * 3
  assert (
    json.loads((tmp_path / 'versions.json').read_text(encoding='utf-8'))['jax'] == jax.__version__
  )


@pytest.mark.parametrize('separator', ['\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\t'])
def test_names_with_line_separators_of_unicode_are_read_back(tmp_path, separator):
  names = (f'a{separator}b', f'{separator}c', f'd{separator}')
  write_run_description(tmp_path, Config(steps=5), names)
  assert read_run_labels(tmp_path) == names
  write_run_description(tmp_path, Config(steps=5), names)  # As when a run is resumed.


def test_another_run_in_the_directory_is_an_error_that_lists_the_differing_fields(tmp_path):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  other = Config(steps=6, log_every='1')  # log_every may change.
  with pytest.raises(UserError, match=r'differ in steps: 5 [^;]* 6 [^;]*$'):
    write_run_description(tmp_path, other, ('cat', 'dog'))
  with pytest.raises(UserError, match='classes'):
    write_run_description(tmp_path, Config(steps=5), ('cat', 'cow'))
  write_run_description(tmp_path, Config(steps=5, log_every='1'), ('cat', 'dog'))


def test_changed_data_are_an_error_until_data_json_is_removed(tmp_path):
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 800, 'order': 1}
  )
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 800, 'order': 1}
  )
  with pytest.raises(
    UserError,
    match=r'train\.examples: 800 .*data\.json',
  ):
    write_run_description(
      tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 801, 'order': 1}
    )
  (tmp_path / 'data.json').unlink()
  write_run_description(
    tmp_path, Config(steps=5), ('cat', 'dog'), {'train.examples': 801, 'order': 1}
  )
  assert json.loads((tmp_path / 'data.json').read_text(encoding='utf-8')) == {
    'train.examples': 801,
    'order': 1,
  }


def write_old_run(workdir, config: Config):
  """Write a run directory without the settings and steps that older versions did not record."""
  write_run_description(workdir, config, ('cat', 'dog'))
  content = config_to_dict(config)
  for name in ('orient', 'jpeg_dct', 'interpolation'):
    del content['data'][name]
  (workdir / 'config.json').write_text(json.dumps(content), encoding='utf-8')
  steps = {'size': [224, 224], 'crop': 'resize', 'short_side': 256}
  steps |= {'mean': [127.5] * 3, 'scale': [127.5] * 3}
  (workdir / 'preprocessing.json').write_text(json.dumps(steps), encoding='utf-8')


def test_a_run_of_an_older_version_keeps_what_the_code_did_then(tmp_path):
  photos = Config(steps=5, data=DataConfig(train='folder:photos'))
  write_old_run(tmp_path, photos)
  stored = read_run_config(tmp_path)
  assert (stored.data.orient, stored.data.jpeg_dct) == ('ignore', 'fast')
  steps = read_run_preprocessing(tmp_path)
  assert (steps.orient, steps.jpeg_dct, steps.interpolation) == ('ignore', 'fast', 'tf_bilinear')
  resumed = adopt_unrecorded_settings(photos, tmp_path)  # The command that started it.
  assert (resumed.data.orient, resumed.data.jpeg_dct) == ('ignore', 'fast')
  write_run_description(tmp_path, resumed, ('cat', 'dog'))
  other = dataclasses.replace(photos, data=dataclasses.replace(photos.data, orient='exif'))
  with pytest.raises(UserError, match='data.orient: ignore there, exif here'):
    write_run_description(tmp_path, adopt_unrecorded_settings(other, tmp_path), ('cat', 'dog'))


def test_settings_without_effect_are_not_adopted(tmp_path):
  config = Config(steps=5)  # Its images are arrays.
  write_old_run(tmp_path, config)
  assert read_run_config(tmp_path) == adopt_unrecorded_settings(config, tmp_path) == config
  assert adopt_unrecorded_settings(config, tmp_path / 'none') == config


def test_an_unwritable_directory_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('', encoding='utf-8')
  with pytest.raises(UserError, match='cannot write to .*--workdir'):
    write_run_description(tmp_path / 'file' / 'run', Config(steps=5), ('cat',))


def test_a_directory_without_config_json_is_an_error(tmp_path):
  with pytest.raises(UserError, match='config.json'):
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
def test_an_invalid_config_json_is_an_error_that_names_the_field(tmp_path, field, value, message):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  content = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')) | {field: value}
  (tmp_path / 'config.json').write_text(json.dumps(content), encoding='utf-8')
  with pytest.raises(UserError, match=f'config.json: {message}'):
    read_run_config(tmp_path)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('size', [8]),
    ('size', 'large'),
    ('crop', 'middle'),
    ('resize_size', [256, 1.5]),
    ('interpolation', 'bilinear'),
    ('scale', [1, 0, 1]),
    ('jpeg_dct', True),
    ('mean', [1, 2]),
    ('more', 1),
  ],
)
def test_invalid_preprocessing_is_an_error_that_names_the_field(tmp_path, field, value):
  write_run_description(tmp_path, Config(steps=5), ('cat', 'dog'))
  assert read_run_preprocessing(tmp_path).size == (224, 224)
  content = json.loads((tmp_path / 'preprocessing.json').read_text(encoding='utf-8')) | {
    field: value
  }
  (tmp_path / 'preprocessing.json').write_text(json.dumps(content), encoding='utf-8')
  with pytest.raises(UserError, match=f'preprocessing.json: {field}='):
    read_run_preprocessing(tmp_path)


def test_a_name_that_is_too_long_for_a_directory_is_an_error_in_one_line(tmp_path):
  with pytest.raises(UserError, match=r'name too long; choose another --workdir') as error:
    check_same_run(tmp_path / ('x' * 256), Config(), ('a', 'b'))
  assert error.value.exit_code == 2 and '\n' not in str(error.value)


def test_passwords_in_urls_are_not_stored_and_may_change_on_resume(tmp_path):
  url = 'https://ann:s3cr@t@example.com/a@b/vit.npz'
  config = Config(steps=5, init=url, data=DataConfig(train='csv:gs://me@bucket/x.csv'))
  write_run_description(tmp_path, config, ('cat', 'dog'))
  assert not [path for path in tmp_path.iterdir() if b's3cr' in path.read_bytes()]
  stored = read_run_config(tmp_path)
  assert stored.init == 'https://***@example.com/a@b/vit.npz'
  assert stored.data.train == 'csv:gs://***@bucket/x.csv'
  for user in ('ann:s3cr@t@', 'bob:new@'):
    again = dataclasses.replace(config, init=f'https://{user}example.com/a@b/vit.npz')
    write_run_description(tmp_path, again, ('cat', 'dog'))
  other = dataclasses.replace(config, init='https://ann:s3cr@t@example.com/other.npz')
  with pytest.raises(UserError, match='differ in init: ') as error:
    write_run_description(tmp_path, other, ('cat', 'dog'))
  assert 's3cr' not in str(error.value)
