"""Models of the Hugging Face hub, from a local server that speaks the hub's protocol."""

from pathlib import Path

import flax.traverse_util
import numpy as np
import pytest

import vit_jax
from tests.pretrained.hub_server import COMMIT, OLD_COMMIT, stop_answering
from tests.pretrained.released_layout import draw
from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.hub import fetch_from_hub, parse_hub_name
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.weight_files import choose_weights


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """Return the directory of a small ViT in the layout of transformers."""
  config = ModelConfig(variant='mu/8', depth=2, heads=4)
  params = flax.traverse_util.unflatten_dict(draw(config, 3, (32, 32)), sep='/')
  preprocessing = Preprocessing(
    size=(32, 32), interpolation='pil_bicubic', mean=config.mean, scale=config.scale
  )
  model = PretrainedModel(
    source='drawn', params=params, config=config, classes=3, preprocessing=preprocessing,
    labels=('ant', 'bee', 'cat'),
  )  # fmt: skip
  folder = tmp_path_factory.mktemp('hub') / 'vit'
  export_model(model, folder, 'huggingface')
  return folder


@pytest.fixture
def hub(empty_hub, folder):
  """Return a simulated hub with two models."""
  extra = {'README.md': b'# A model', 'model.fp16.safetensors': b'x', 'onnx/model.onnx': b'x'}
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  empty_hub.repos |= dict.fromkeys(('org/vit', 'org/gated'), files | extra)
  return empty_hub


def test_a_model_is_loaded_by_its_name_and_only_its_files_are_downloaded(hub, folder):
  model = vit_jax.load('hf:org/vit')
  assert (model.source, model.labels, model.size) == ('hf:org/vit', ('ant', 'bee', 'cat'), (32, 32))
  downloaded = {path.split('/')[-1] for _, path in hub.requests if not path.startswith('api/')}
  assert downloaded == {'config.json', 'preprocessor_config.json', 'model.safetensors'}
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
  np.testing.assert_array_equal(model.logits(images), vit_jax.load(str(folder)).logits(images))


def test_a_second_load_downloads_nothing(hub):
  first = fetch_from_hub('hf:org/vit')
  hub.requests.clear()
  assert fetch_from_hub('hf:org/vit') == first
  got = [path for method, path in hub.requests if method == 'GET']
  assert got == ['api/models/org/vit']


@pytest.mark.parametrize('problem', [500, 503, 'no network', 'offline mode'])
def test_without_the_hub_the_cache_is_used(hub, monkeypatch, problem):
  path = fetch_from_hub('hf:org/vit')
  stop_answering(hub, monkeypatch, problem)
  assert fetch_from_hub('hf:org/vit') == path


def test_without_the_hub_and_the_cache_the_error_says_so(hub, monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://localhost:1')
  with pytest.raises(UserError, match='hf:org/vit: http://localhost:1 cannot be reached') as error:
    fetch_from_hub('hf:org/vit')
  assert '\n' not in str(error.value)


def test_a_cache_without_the_weights_is_not_complete(hub, monkeypatch):
  path = fetch_from_hub('hf:org/vit')
  path.unlink()
  monkeypatch.setenv('HF_ENDPOINT', 'http://localhost:1')
  with pytest.raises(UserError, match='cannot be reached'):
    fetch_from_hub('hf:org/vit')


def test_a_revision_has_its_own_files(hub):
  assert COMMIT in str(fetch_from_hub('hf:org/vit'))
  assert OLD_COMMIT in str(fetch_from_hub('hf:org/vit@v1'))


def test_a_gated_model_needs_the_token(hub, monkeypatch):
  with pytest.raises(UserError, match='accept its conditions at .*/org/gated'):
    fetch_from_hub('hf:org/gated')
  monkeypatch.setenv('HF_TOKEN', 'hf_token')
  assert fetch_from_hub('hf:org/gated').name == 'model.safetensors'


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('hf:org/nothing', 'the hub has no model org/nothing'),
    ('hf:org/vit@v9', 'no such revision'),
    ('hf:vit', 'expected hf:ORG/NAME'),
    ('hf:org/vit@', 'expected hf:ORG/NAME'),
    ('hf:org/../x', 'expected hf:ORG/NAME'),
    ('hf:https://huggingface.co/org/vit', 'expected hf:ORG/NAME'),
  ],
)
def test_a_wrong_name_is_a_one_line_error(hub, name, message):
  with pytest.raises(UserError, match=message) as error:
    fetch_from_hub(name)
  assert '\n' not in str(error.value)


def test_a_name_may_have_dots_and_a_revision():
  assert parse_hub_name('hf:timm/vit_b.augreg-in1k@refs/pr/1') == (
    'timm/vit_b.augreg-in1k',
    'refs/pr/1',
  )


@pytest.mark.parametrize(
  ('files', 'chosen'),
  [
    (['model.fp16.safetensors', 'model.safetensors', 'pytorch_model.bin'], ['model.safetensors']),
    (['open_clip_model.safetensors', 'x.safetensors'], ['open_clip_model.safetensors']),
    (
      ['model-00002-of-00002.safetensors', 'model-00001-of-00002.safetensors'],
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'],
    ),
    (['vit.npz', 'sub/model.safetensors'], ['vit.npz']),
    (['vit.fp16.safetensors', 'vit.safetensors'], ['vit.safetensors']),
    (['vit.bf16.safetensors', 'vit.float16.safetensors', 'vit.safetensors'], ['vit.safetensors']),
    (['vit.fp16.safetensors'], ['vit.fp16.safetensors']),
    (['vit.npz', 'vit.fp16.npz'], ['vit.npz']),
    (
      [
        'model-00001-of-00001.safetensors',
        'model.fp16-00001-of-00002.safetensors',
        'model.fp16-00002-of-00002.safetensors',
        'model.safetensors.index.fp16.json',
        'model.safetensors.index.json',
        'other.safetensors',
      ],
      ['model-00001-of-00001.safetensors'],
    ),
    (
      [
        'vit-00001-of-00002.fp16.safetensors',
        'vit-00001-of-00002.safetensors',
        'vit-00002-of-00002.fp16.safetensors',
        'vit-00002-of-00002.safetensors',
        'vit.fp16.safetensors',
        'vit.safetensors.index.json',
      ],
      ['vit-00001-of-00002.safetensors', 'vit-00002-of-00002.safetensors'],
    ),
    (['vit-00001-of-00002.safetensors', 'vit.safetensors'], ['vit.safetensors']),
    (['vit-00001-of-00002.safetensors'], 'vit.safetensors has 1 files, but shard 2 is missing'),
    (
      [
        'a-00001-of-00001.safetensors',
        'a-00001-of-00002.safetensors',
        'a-00002-of-00002.safetensors',
      ],
      'several ways',
    ),
    (['vit.ema.safetensors', 'vit.safetensors'], 'several weights'),
    (['pytorch_model.bin', 'config.json'], ['pytorch_model.bin']),
    (['a.safetensors', 'b.safetensors'], 'several weights: a.safetensors, b.safetensors'),
    (['config.json', 'tf_model.h5'], 'no weights .* config.json, tf_model.h5'),
    ([], 'its files: none'),
  ],
)
def test_the_weights_are_the_complete_model_in_the_safest_format(files, chosen):
  if isinstance(chosen, list):
    assert choose_weights(files, 'hf:a/b') == chosen
  else:
    with pytest.raises(UserError, match=chosen):
      choose_weights(files, 'hf:a/b')
