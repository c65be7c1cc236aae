"""Preprocessing is read as files state it, and the rest is listed as assumed."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vit_jax
from tests.pretrained.published_preprocessors import HUGGING_FACE
from tests.pretrained.released_layout import google_file
from tests.pretrained.test_export import model
from vit_jax.config import Config, ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.huggingface_preprocessing import read_hf_preprocessing
from vit_jax.pretrained.timm_preprocessing import read_timm_preprocessing
from vit_jax.training.initial_state import check_init_model

IMAGENET = {'mean': (123.675, 116.28, 103.53), 'scale': (58.395, 57.12, 57.375)}
HALF = {'mean': (127.5,) * 3, 'scale': (127.5,) * 3}
CONFIG = ModelConfig(variant='mu/8', depth=2, heads=4)
UNSTATED = {'mean', 'scale', 'crop', 'interpolation'}


@pytest.fixture
def exported(tmp_path):
  """Return a function that exports a model and removes or changes its JSON files."""

  def export(format: str, *, remove=(), change=None, arrays=None, **fields) -> str:
    export_model(model(**fields), tmp_path / 'hub', format)
    for name in remove:
      (tmp_path / 'hub' / name).unlink()
    for name, changes in (change or {}).items():
      path = tmp_path / 'hub' / name
      path.write_text(
        json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8'
      )
    if arrays:
      path = tmp_path / 'hub' / 'model.safetensors'
      save_file(arrays(load_file(path)), path)
    return str(tmp_path / 'hub')

  return export


def with_layer_scale(arrays: dict) -> dict:
  """Return the arrays of a timm model with layer scales of one, as DINOv2 has them."""
  ones = np.ones(32, np.float32)
  return arrays | {f'blocks.{i}.ls{n}.gamma': ones for i in range(2) for n in (1, 2)}


CONFIGS = ('config.json', 'preprocessor_config.json')
DINOV2 = {'registers': 3, 'classes': 0}
LONE = {
  # format, files that are missing, change of the arrays, fields of the model: statistics, crop,
  # interpolation.
  'ViT of transformers': (
    'huggingface', CONFIGS[1:], None, {}, HALF, 'resize', 'pil_bilinear',
  ),
  'DINOv2 of transformers': (
    'huggingface', CONFIGS[1:], None, DINOV2, IMAGENET, 'center', 'pil_bicubic',
  ),
  'DINOv2 of transformers without any JSON': (
    'huggingface', CONFIGS, None, DINOV2, IMAGENET, 'center', 'pil_bicubic',
  ),
  'augreg of timm': ('timm', CONFIGS[:1], None, {}, HALF, 'center', 'pil_bicubic'),
  'DINOv2 of timm': (
    'timm', CONFIGS[:1], with_layer_scale, {}, IMAGENET, 'center', 'pil_bicubic',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', LONE)
def test_a_file_without_preprocessing_gets_its_familys_as_assumptions(exported, case):
  format, remove, arrays, fields, statistics, crop, interpolation = LONE[case]
  found = vit_jax.load(exported(format, remove=remove, arrays=arrays, **fields), heads=4)
  steps = found.preprocessing
  assert (steps.mean, steps.scale) == (statistics['mean'], statistics['scale'])
  assert (steps.crop, steps.interpolation) == (crop, interpolation)
  assert set(found.assumed) >= UNSTATED
  (note,) = (note for note in found.notes if 'assuming mean' in note)
  assert interpolation in note and remove[-1] in note


@pytest.mark.parametrize('statistics', [IMAGENET, HALF, {'mean': (1, 2, 3), 'scale': (4, 5, 6)}])
@pytest.mark.parametrize('case', LONE)
def test_fine_tuning_believes_the_user_where_the_file_states_nothing(exported, case, statistics):
  format, remove, arrays, fields, assumed, *_ = LONE[case]
  found = vit_jax.load(exported(format, remove=remove, arrays=arrays, **fields), heads=4)
  chosen = dataclasses.replace(found.config, **statistics)
  lines = check_init_model(Config(model=chosen, init='x'), found)
  assert len(lines) == (0 if statistics == assumed else 2)


def test_fine_tuning_refuses_other_statistics_than_the_file_states(exported):
  found = vit_jax.load(exported('huggingface'))
  assert not UNSTATED & set(found.assumed)
  chosen = dataclasses.replace(found.config, **HALF)
  with pytest.raises(UserError, match='--config.model.mean=123.675'):
    check_init_model(Config(model=chosen, init='x'), found)


def test_fine_tuning_refuses_a_model_without_the_rotary_positions_of_the_file(exported):
  found = vit_jax.load(exported('huggingface', position='rope', classes=0, rope_theta=50.0))
  chosen = dataclasses.replace(found.config, position='none', rope_theta=100.0)
  with pytest.raises(UserError, match='--config.model.position=rope --config.model.rope_theta=50'):
    check_init_model(Config(model=chosen, init='x'), found)


def test_fine_tuning_names_the_interpolation_that_the_file_states(exported):
  found = vit_jax.load(exported('huggingface'))
  config = Config(model=found.config, init='x')
  (line,) = check_init_model(config, found)
  assert '--config.data.interpolation=pil_bicubic' in line
  data = dataclasses.replace(config.data, interpolation='pil_bicubic')
  assert check_init_model(dataclasses.replace(config, data=data), found) == []


def test_fields_that_a_file_leaves_out_are_assumed(exported):
  changes = dict.fromkeys(('image_mean', 'resample', 'size'))
  source = exported('huggingface', change={'preprocessor_config.json': changes})
  assert set(vit_jax.load(source).assumed) == {'mean', 'interpolation', 'crop', 'resize_size'}
  given = vit_jax.load(source, mean=0.4, interpolation='pil_box', crop='resize')
  assert not UNSTATED & set(given.assumed)


def test_overrides_replace_single_steps(exported):
  source = exported('timm')
  own = vit_jax.load(source).preprocessing
  assert own.resize_size == (40, 40)
  changed = {
    'interpolation': 'pil_lanczos', 'orient': 'ignore', 'jpeg_dct': 'fast',
  }  # fmt: skip
  steps = vit_jax.load(source, **changed).preprocessing
  assert steps == dataclasses.replace(own, **changed)
  steps = vit_jax.load(source, crop='squash', short_side=36).preprocessing
  assert (steps.crop, steps.resize_size) == ('squash', (36, 36))
  assert vit_jax.load(source, crop='resize').preprocessing.resize_size is None
  with pytest.raises(UserError, match='short_side=20 is less than'):
    vit_jax.load(source, short_side=20)
  with pytest.raises(UserError, match="interpolation='cubic' is not supported; expected tf_bil"):
    vit_jax.load(source, interpolation='cubic')


def test_googles_files_are_resized_without_a_crop_and_big_visions_are_cropped(tmp_path):
  path = tmp_path / 'model.npz'
  google_file(path, CONFIG, classes=5, size=(224, 224))
  steps = vit_jax.load(str(path)).preprocessing
  assert steps == Preprocessing(size=(224, 224), jpeg_dct='fast')
  with np.load(path) as file:
    arrays = {
      'params/' + name.replace('HeadDotProductAttention_1', 'HeadDotProductAttention_0')
      .replace('LayerNorm_2', 'LayerNorm_1').replace('MlpBlock_3', 'MlpBlock_0'): file[name]
      for name in file
    }  # fmt: skip
  np.savez(path, **arrays)
  found = vit_jax.load(str(path))
  steps = found.preprocessing
  assert (steps.crop, steps.resize_size) == ('center', (256, 256))
  assert (steps.interpolation, steps.jpeg_dct, steps.rounding) == ('tf_area', 'fast', 'tf')
  assert set(found.assumed) >= UNSTATED
  assert vit_jax.load(str(path), size=240).preprocessing.resize_size == (274, 274)
  np.savez(path, **{name.replace('params/', 'params/img/'): each for name, each in arrays.items()})
  assert vit_jax.load(str(path)).preprocessing.crop == 'resize'  # The image tower of SigLIP.


HF_ERRORS = {
  'do_pad': ({'do_pad': True}, 'do_pad=True is not supported; supported steps'),
  'class': ({'image_processor_type': 'LevitImageProcessor'}, "'LevitImageProcessor'.*expected ViT"),
  'filter': ({'resample': 9}, 'resample 9 is not supported; expected 0, 1'),
  'longest': ({'size': {'shortest_edge': 8, 'longest_edge': 9}}, 'size.longest_edge'),
  'no crop': (
    {'size': {'shortest_edge': 8}, 'do_center_crop': False},
    'shortest_edge=8 without do_center_crop',
  ),
  'a size of one word': ({'size': 'large'}, "size is 'large'"),
  'an edge of zero': ({'size': {'shortest_edge': 0}}, 'size.shortest_edge is 0'),
  'no size': ({'size': {'max_height': 8, 'max_width': 8}}, 'size is'),
}


@pytest.mark.parametrize('case', HF_ERRORS)
def test_an_unsupported_step_of_hugging_face_names_file_and_field(case):
  changes, message = HF_ERRORS[case]
  content = HUGGING_FACE['facebook/dinov2-base'] | changes
  with pytest.raises(UserError, match=f'^preprocessor_config.json: .*{message}') as error:
    read_hf_preprocessing(content, {}, is_dinov2=True)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'crop', 'size'),
  [
    ({'do_resize': False}, 'none', (224, 224)),
    ({'do_resize': False, 'do_center_crop': False, 'size': 32}, 'none', (32, 32)),
    ({'do_center_crop': False, 'size': {'height': 32, 'width': 48}}, 'resize', (32, 48)),
  ],
)
def test_steps_that_are_off_are_left_out(changes, crop, size):
  content = HUGGING_FACE['facebook/dinov2-base'] | changes
  facts = read_hf_preprocessing(content, {}, is_dinov2=True)
  assert (facts['crop'], facts['target_size']) == (crop, size)
  assert 'resize_size' not in facts


TIMM_ERRORS = {
  'interpolation': ({'interpolation': 'random'}, "interpolation 'random' is not supported"),
  'mode': ({'crop_mode': 'corner'}, "crop_mode 'corner' is not supported; expected center, squash"),
  'crop_pct': ({'crop_pct': -1}, 'crop_pct is -1'),
}  # fmt: skip


@pytest.mark.parametrize('case', TIMM_ERRORS)
def test_an_unsupported_step_of_timm_names_file_and_field(case):
  changes, message = TIMM_ERRORS[case]
  fields = {'mean': [0.5] * 3, 'crop_pct': 0.9, 'crop_mode': 'center', 'interpolation': 'bicubic'}
  with pytest.raises(UserError, match=f'^config.json: {message}') as error:
    read_timm_preprocessing({'pretrained_cfg': fields | changes}, {}, {'scale': (1, 1, 1)})
  assert '\n' not in str(error.value)


CROPS = [
  ('resize', None), ('center', (32, 32)), ('center', (36, 36)), ('squash', (40, 40)),
  ('border', (32, 32)), ('border', (36, 36)), ('none', None),
]  # fmt: skip


@pytest.mark.parametrize(('crop', 'resize_size'), CROPS, ids=str)
@pytest.mark.parametrize('format', ['timm', 'huggingface', 'npz'])
def test_an_export_is_read_with_the_same_steps(tmp_path, format, crop, resize_size):
  ours = model()
  steps = dataclasses.replace(ours.preprocessing, crop=crop, resize_size=resize_size)
  ours = dataclasses.replace(ours, preprocessing=steps)
  to = tmp_path / ('model.npz' if format == 'npz' else 'hub')
  if (format, crop) in {('timm', 'none'), ('huggingface', 'border')}:
    with pytest.raises(UserError, match='crop'):
      export_model(ours, to, format)
    return
  assert len(export_model(ours, to, format)) == 1
  again = vit_jax.load(str(to)).preprocessing
  assert again == dataclasses.replace(steps, rounding=again.rounding)


@pytest.mark.parametrize(
  ('interpolation', 'nearest'), [('tf_bilinear', 'pil_bilinear'), ('tf_area', 'pil_box')]
)
@pytest.mark.parametrize('format', ['timm', 'huggingface'])
def test_an_export_says_which_step_the_format_lacks(tmp_path, format, interpolation, nearest):
  ours = model()
  steps = dataclasses.replace(ours.preprocessing, interpolation=interpolation)
  lines = export_model(dataclasses.replace(ours, preprocessing=steps), tmp_path / 'hub', format)
  assert f'interpolation {nearest} for {interpolation}' in lines[1]
  assert vit_jax.load(str(tmp_path / 'hub')).preprocessing.interpolation == nearest
