"""Models of timm and Hugging Face with equal arrays and different functions are distinguished."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import vit_jax
from tests.pretrained.families import normalised, redrawn
from vit_jax.errors import UserError


# timm's numbers of heads, which its files do not contain: width 64, 96 and 768.
@pytest.mark.parametrize(
  ('name', 'heads'),
  [('test_vit', 2), ('vit_base_patch16_gap_224', 16), ('vit_tiny_patch16_224', 3)],
)
def test_the_heads_of_an_architecture_are_those_of_timm(tmp_path, timm, name, heads):
  theirs = timm.create_model(name, img_size=32, num_classes=7, depth=1)
  assert theirs.blocks[0].attn.num_heads == heads
  config = {'architecture': name, 'pretrained_cfg': {'input_size': [3, 32, 32]}}
  arrays = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
  save_file(arrays, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  # Depth 1 is no named size, so that the heads are part of the config.
  ours = vit_jax.load(str(tmp_path))
  assert ours.model.shape.heads == heads
  assert not {'heads', 'gelu', 'norm_eps'} & set(ours.assumed)
  (tmp_path / 'config.json').unlink()
  assert {'heads', 'gelu', 'norm_eps'} <= set(vit_jax.load(str(tmp_path), size=32).assumed)


SIZES = {
  'hidden_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 3, 'intermediate_size': 96,
  'image_size': 32, 'patch_size': 16,
}  # fmt: skip


@pytest.mark.parametrize('family', ['ViTMSN', 'IJepa'])
def test_types_of_hugging_face_with_the_function_of_vit_compute_its_tokens(
  tmp_path, transformers, family
):
  import torch

  config = getattr(transformers, f'{family}Config')(**SIZES)
  theirs = redrawn(getattr(transformers, f'{family}Model')(config))
  theirs.save_pretrained(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  with torch.no_grad():
    expected = theirs(normalised(images)).last_hidden_state.numpy()
  ours = vit_jax.load(str(tmp_path), mean=0.5, std=0.5)
  assert not {'gelu', 'norm_eps', 'heads'} & set(ours.assumed)
  np.testing.assert_allclose(
    ours.tokens(images), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )


def test_a_type_with_the_arrays_of_vit_and_another_function_is_refused(tmp_path, transformers):
  theirs = transformers.DPTModel(transformers.DPTConfig(**SIZES))  # Other position embeddings.
  theirs.save_pretrained(tmp_path)
  with pytest.raises(UserError, match="model_type='dpt'"):
    vit_jax.load(str(tmp_path))


def test_what_config_json_does_not_state_is_assumed(tmp_path, transformers):
  transformers.ViTModel(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(
    '{"model_type": "vit", "layer_norm_eps": 1e-12}', encoding='utf-8'
  )
  assumed = vit_jax.load(str(tmp_path), heads=3).assumed
  assert 'gelu' in assumed and 'norm_eps' not in assumed and 'heads' not in assumed
