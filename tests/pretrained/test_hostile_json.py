"""Odd values in the JSON files of timm, Hugging Face and `export` are one line, or a sane model."""

import json

import numpy as np
import pytest

import vit_jax
from tests.pretrained.test_export import model
from vit_jax.errors import UserError
from vit_jax.pretrained import image_size
from vit_jax.pretrained.export import export_model

NAN, INFINITY, HUGE = float('nan'), float('inf'), 10**400
VALUES = [
  'text', -1, 1.5, True, 40_000, 10**9, HUGE, NAN, INFINITY, 1e-320, 1e308, [1], [NAN] * 3,
  [0, 0, 0], [1e308] * 3, [True] * 3, [HUGE] * 3, [3, 10**9, 10**9], {'height': HUGE, 'width': 1},
  {'height': 40_000, 'width': 40_000}, {'shortest_edge': 40_000}, {'shortest_edge': 'x'}, [[]],
]  # fmt: skip
FIELDS = [
  ('timm', 'config.json', ['pretrained_cfg', 'crop_pct']),
  ('timm', 'config.json', ['pretrained_cfg', 'input_size']),
  ('timm', 'config.json', ['pretrained_cfg', 'mean']),
  ('timm', 'config.json', ['pretrained_cfg', 'std']),
  ('timm', 'config.json', ['model_args', 'img_size']),
  ('timm', 'config.json', ['model_args', 'num_heads']),
  ('huggingface', 'config.json', ['image_size']),
  ('huggingface', 'config.json', ['layer_norm_eps']),
  ('huggingface', 'config.json', ['num_attention_heads']),
  ('huggingface', 'preprocessor_config.json', ['size']),
  ('huggingface', 'preprocessor_config.json', ['crop_size']),
  ('huggingface', 'preprocessor_config.json', ['image_mean']),
  ('huggingface', 'preprocessor_config.json', ['image_std']),
  ('huggingface', 'preprocessor_config.json', ['rescale_factor']),
]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """Return a folder with one model in the directories 'timm' and 'huggingface'."""
  folder = tmp_path_factory.mktemp('exported')
  for format in ('timm', 'huggingface'):
    export_model(model(), folder / format, format)
  return folder


@pytest.mark.parametrize(('format', 'name', 'keys'), FIELDS)
def test_an_odd_value_is_a_short_line_or_a_model_of_sane_numbers(exported, format, name, keys):
  file = exported / format / name
  original = file.read_text(encoding='utf-8')
  try:
    for value in VALUES:
      content = json.loads(original)
      content |= {'do_center_crop': True} if keys == ['crop_size'] else {}
      place = content
      for key in keys[:-1]:
        place = place[key]
      place[keys[-1]] = value
      file.write_text(json.dumps(content), encoding='utf-8')
      assert_error_or_sane(str(file.parent))
  finally:
    file.write_text(original, encoding='utf-8')


def assert_error_or_sane(source: str):
  try:
    found = vit_jax.load(source)
  except UserError as error:
    assert '\n' not in str(error)
    assert len(str(error)) < 500
    return
  steps = found.preprocessing
  assert max(*steps.size, *(steps.resize_size or ())) <= 32_768
  assert np.isfinite([*steps.mean, *steps.scale, found.config.norm_eps]).all()
  assert min(steps.scale) > 0 and found.config.norm_eps >= 0


def test_a_size_of_millions_of_patches_is_refused_before_positions_are_resampled(
  exported, monkeypatch
):
  monkeypatch.setattr(image_size, 'resample_positions', None)  # Calling it would fail.
  file = exported / 'huggingface' / 'preprocessor_config.json'
  original = file.read_text(encoding='utf-8')
  try:
    side = {'height': 30_000, 'width': 30_000}  # 3,750 patches of 8 pixels a side.
    file.write_text(
      json.dumps(json.loads(original) | {'do_center_crop': True, 'crop_size': side}),
      encoding='utf-8',
    )
    with pytest.raises(UserError, match='30000x30000 pixels have 14,062,500 patches') as error:
      vit_jax.load(str(file.parent))
    assert '\n' not in str(error.value)
  finally:
    file.write_text(original, encoding='utf-8')
