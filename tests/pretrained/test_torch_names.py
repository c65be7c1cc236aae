"""What timm's and Hugging Face's files may get wrong: one line that names the array. Reading them right is test_parity's."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vit_jax
from tests.pretrained.test_export import model
from vit_jax.errors import UserError
from vit_jax.pretrained.export import export


@pytest.fixture
def hub(tmp_path):
  """Writes one of our models in a format, changes its arrays and its config.json, and loads it."""

  def load(format: str, change=lambda arrays: None, said=None, **fields):
    export(model(**fields), tmp_path / 'hub', format)
    arrays = load_file(tmp_path / 'hub' / 'model.safetensors')
    change(arrays)
    save_file(arrays, tmp_path / 'hub' / 'model.safetensors')
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text()) | (said or {})
    (tmp_path / 'hub' / 'config.json').write_text(json.dumps(config))
    return vit_jax.load(str(tmp_path / 'hub'))

  return load


def without(*names: str):
  return lambda arrays: [arrays.pop(name) for name in names]


def also(**found: np.ndarray):
  return lambda arrays: arrays.update({name.replace('__', '.'): array for name, array in found.items()})


QKV_BIAS = ('blocks.0.attn.qkv.bias', 'blocks.1.attn.qkv.bias')
one = np.zeros(1, np.float32)
WRONG = {
  'two heads': ('timm', also(dist_token=one), 'distilled DeiT'),
  'a norm after pooling': ('timm', also(fc_norm__weight=one), 'last norm comes after pooling'),
  'a norm before the blocks': ('timm', also(norm_pre__weight=one), 'a norm before the blocks'),
  'norms of queries': ('timm', also(blocks__0__attn__q_norm__weight=one), 'has no place for: blocks.0.attn.q_norm.weight'),
  'no bias of the projection': (
    'timm',
    without('blocks.0.attn.qkv.bias', 'blocks.1.attn.qkv.bias'),
    'query/bias .* is missing',
  ),
  'a block that lacks an array': ('timm', without('blocks.1.norm2.bias'), 'block 1 of 2 has no LayerNorm_2/bias'),
  'a kernel of another rank': ('timm', also(head__weight=np.zeros((5, 8, 4), np.float32)), '2 axes are expected'),
  'patches of another rank': ('timm', also(patch_embed__proj__weight=one), r'expected \[width, channels'),
  'LayerScale of another width': ('timm', also(blocks__0__ls1__gamma=one, blocks__1__ls1__gamma=one), 'of as many outputs'),
  'a gated MLP': ('timm', also(blocks__0__mlp__fc1__weight=np.zeros((256, 32), np.float32)), 'mlp|Dense_0'),
  'an unknown array': ('huggingface', also(vit__surprise=one), 'has no place for: surprise'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_model_that_we_are_not_is_one_line_that_names_the_array(hub, case):
  format, change, message = WRONG[case]
  with pytest.raises(UserError, match=message) as error:
    hub(format, change)
  assert '\n' not in str(error.value)


def test_heads_that_do_not_divide_are_an_error(hub):
  with pytest.raises(UserError, match='does not divide into 5 heads'):
    hub('huggingface', said={'num_attention_heads': 5})


def test_an_activation_that_we_do_not_have_is_an_error(hub):
  with pytest.raises(UserError, match="the activation 'quick_gelu' is not among those here"):
    hub('huggingface', said={'hidden_act': 'quick_gelu'})


def test_the_mask_token_of_pre_training_is_left_out_and_that_is_said(hub):
  found = hub('timm', also(mask_token=np.zeros((1, 32), np.float32)))
  assert found.notes == ('mask_token, which only pre-training uses, is left out',)
