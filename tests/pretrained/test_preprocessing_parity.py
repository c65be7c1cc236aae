"""Our preprocessing gives the pixels of timm's and transformers' own transforms on real photos."""

import importlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.published_preprocessors import HUGGING_FACE, TIMM
from vit_jax.config import ModelConfig
from vit_jax.data.images import write_eval_image
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.pretrained.huggingface_preprocessing import read_hf_preprocessing
from vit_jax.pretrained.preprocessing import resolve_preprocessing
from vit_jax.pretrained.timm_preprocessing import read_timm_preprocessing, timm_defaults

PHOTOS = 20
PROCESSOR_MODULES = {
  'ViT': 'vit', 'DeiT': 'deit', 'Bit': 'bit', 'CLIP': 'clip', 'Siglip': 'siglip',
  'ConvNext': 'convnext', 'Beit': 'beit',
}  # fmt: skip


@pytest.fixture(scope='module')
def photos() -> list[bytes]:
  """Return 20 JPEG photos of several shapes."""
  from tests.conftest import SHARED

  if not SHARED.is_dir():
    pytest.skip(f'no {SHARED}')
  with tarfile.open(SHARED / 'flower_photos_1000.tar') as tar:
    members = [each for each in tar if each.name.endswith('.jpg')]
    return [tar.extractfile(each).read() for each in members[:: len(members) // PHOTOS][:PHOTOS]]


def our_pixels(photo: bytes, steps: Preprocessing) -> np.ndarray:
  out = np.empty((*steps.size, 3), np.float32)
  write_eval_image(photo, out, name='photo', steps=steps, user_file=True, max_pixels=10**8)
  return out


def resolved(facts: dict, size: tuple[int, int]) -> Preprocessing:
  config = ModelConfig(mean=facts['mean'], scale=facts['scale'])
  return resolve_preprocessing(facts, config, native_size=size, size=size, source='x')


def assert_equal_pixels(photos: list[bytes], steps: Preprocessing, expected) -> None:
  """Compare with `expected`, a function from an image to [h, w, 3] in [0, 255]."""
  for photo in photos:
    theirs = expected(Image.open(io.BytesIO(photo)).convert('RGB'))
    ours = our_pixels(photo, steps)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() <= 0.01  # The limit is 1.
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize('name', TIMM)
def test_pixels_are_those_of_timms_transform(name, photos, timm):
  fields = TIMM[name]
  facts = read_timm_preprocessing({'pretrained_cfg': fields}, {}, {})
  assert facts['assumed'] == ()
  transform = timm.data.create_transform(
    input_size=tuple(fields['input_size']),
    **{field: fields[field] for field in ('interpolation', 'crop_pct', 'crop_mode', 'mean')},
    normalize=False,
  )
  expected = lambda image: np.float32(transform(image)).transpose(1, 2, 0)
  assert_equal_pixels(photos, resolved(facts, facts['size']), expected)


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_pixels_are_those_of_transformers_processor(name, photos, transformers):
  content = HUGGING_FACE[name]
  facts = read_hf_preprocessing(content, {}, is_dinov2=False)
  assert facts['assumed'] == ()
  family = content.get('image_processor_type') or content['feature_extractor_type']
  family = family.removesuffix('ImageProcessor').removesuffix('FeatureExtractor')
  module = PROCESSOR_MODULES[family]
  module = importlib.import_module(f'transformers.models.{module}.image_processing_pil_{module}')
  processor = getattr(module, f'{family}ImageProcessorPil')(**content)

  def expected(image: Image.Image) -> np.ndarray:
    pixels = processor(image, do_normalize=False, do_rescale=False)['pixel_values'][0]
    return np.float32(pixels).transpose(1, 2, 0)

  steps = resolved(facts, facts['target_size'])
  assert_equal_pixels(photos, steps, expected)
  np.testing.assert_allclose(np.divide(steps.mean, 255), processor.image_mean, atol=1e-6)
  np.testing.assert_allclose(np.divide(steps.scale, 255), processor.image_std, atol=1e-6)


def test_auto_image_processor_reads_the_same_steps(tmp_path, photos, transformers):
  """The class that transformers chooses itself resizes tensors, which rounds in other places."""
  path = tmp_path / 'preprocessor_config.json'
  for name in ('facebook/deit-base-patch16-224', 'facebook/dinov2-base'):
    path.write_text(json.dumps(HUGGING_FACE[name]), encoding='utf-8')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    facts = read_hf_preprocessing(HUGGING_FACE[name], {}, is_dinov2=False)
    steps = resolved(facts, facts['target_size'])
    for photo in photos:
      image = Image.open(io.BytesIO(photo)).convert('RGB')
      theirs = processor(image, do_normalize=False, do_rescale=False)['pixel_values'][0]
      theirs = np.float32(theirs).transpose(1, 2, 0)
      assert np.abs(our_pixels(photo, steps) - theirs).mean() <= 1


def test_timms_own_defaults_are_ours_for_files_that_state_none(timm):
  cfg = timm.models.PretrainedCfg()
  facts = read_timm_preprocessing(
    {}, {}, timm_defaults({'pretrained_cfg': {'x': 1}}, layer_scale=False)
  )
  assert facts['interpolation'] == f'pil_{cfg.interpolation}'
  assert facts['crop'] == cfg.crop_mode
  assert facts['resize_size'] == (int(224 / cfg.crop_pct),) * 2
  np.testing.assert_allclose(np.divide(facts['mean'], 255), cfg.mean, atol=1e-6)
  assert set(facts['assumed']) == {'mean', 'scale', 'interpolation', 'crop', 'resize_size'}
