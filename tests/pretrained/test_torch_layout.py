"""Files of timm and Hugging Face: errors name the array or field, and all spellings are read.

test_parity.py compares the numbers of each family.
"""

import json
import math

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vit_jax
from tests.pretrained.families import normalised, redrawn, run
from tests.pretrained.test_export import model
from vit_jax.errors import UserError
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.timm_export import to_timm
from vit_jax.pretrained.timm_preprocessing import timm_crop_pct


@pytest.fixture
def hub(tmp_path):
  """Return a function that exports a model, changes its arrays and config.json, and loads it."""

  def load(format: str, change=lambda arrays: None, config_changes=None, **fields):
    export_model(model(**fields), tmp_path / 'hub', format)
    arrays = load_file(tmp_path / 'hub' / 'model.safetensors')
    change(arrays)
    save_file(arrays, tmp_path / 'hub' / 'model.safetensors')
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text(encoding='utf-8')) | (
      config_changes or {}
    )
    (tmp_path / 'hub' / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    return vit_jax.load(str(tmp_path / 'hub'))

  return load


def without(*names: str):
  return lambda arrays: [arrays.pop(name) for name in names]


def also(**found: np.ndarray):
  return lambda arrays: arrays.update(
    {name.replace('__', '.'): array for name, array in found.items()}
  )


QKV_BIAS = ('blocks.0.attn.qkv.bias', 'blocks.1.attn.qkv.bias')
one = np.zeros(1, np.float32)
offsets = np.zeros((52, 4), np.float32)  # Of 4x4 patches and a class token, for each head.
WRONG = {
  'a distillation token of another rank': ('timm', also(dist_token=one), 'dist_token .*3 axes'),
  'a second head without its token': (
    'timm', also(head_dist__weight=np.zeros((5, 32), np.float32)), 'head_dist/kernel .*unexpected',
  ),
  'a norm after pooling': ('timm', also(fc_norm__weight=one), "global_pool='token'"),
  'a norm before the blocks': ('timm', also(norm_pre__weight=one), 'pre_norm/bias'),
  'norms of queries in one block': (
    'timm',
    also(blocks__0__attn__q_norm__weight=one),
    'block 1 of 2 has no .*query_norm/scale',
  ),
  'relative positions of another rank': (
    'timm',
    also(blocks__0__attn__relative_position_bias_table=one),
    'relative_position_bias_table .*2 axes',
  ),
  'absolute and relative positions': (
    'timm', also(rel_pos_bias__relative_position_bias_table=offsets), 'absolute and relative',
  ),
  'relative positions of blocks and of all': (
    'timm',
    also(
      rel_pos_bias__relative_position_bias_table=offsets,
      blocks__0__attn__relative_position_bias_table=offsets,
    ),
    'rel_pos_bias.* and blocks.0',
  ),
  'relative positions of rows and columns': (
    'timm', also(blocks__0__attn__rel_pos_h=one), 'relative positions',
  ),
  "biases of queries and values in timm's Eva": (
    'timm',
    also(blocks__0__attn__q_bias=one),
    "q_bias, an array of timm's Eva",
  ),
  "a gated MLP in timm's Eva": ('timm', also(blocks__0__mlp__fc1_g__weight=one), "timm's Eva"),
  'norms inside the attention': ('timm', also(blocks__0__attn__norm__weight=one), 'EVA-02'),
  'a gate of half a row': (
    'timm', also(blocks__0__mlp__w12__weight=one), r'w12.weight is \[1\], not divisible into 2',
  ),
  'rotary positions': ('timm', also(rope__periods=one), 'rotary positions'),
  'absolute and relative positions in transformers': (
    'huggingface',
    also(vit__encoder__relative_position_bias__relative_position_bias_table=offsets),
    'absolute and relative',
  ),
  'visual tokens': ('huggingface', also(lm_head__weight=one), 'visual tokens'),
  'a block that lacks an array': (
    'timm',
    without('blocks.1.norm2.bias'),
    'block 1 of 2 has no LayerNorm_2/bias',
  ),
  'a kernel of another rank': (
    'timm',
    also(head__weight=np.zeros((5, 8, 4), np.float32)),
    'head.weight .*2 axes',
  ),
  'patches of another rank': (
    'timm',
    also(patch_embed__proj__weight=one),
    r'expected \[width, channels',
  ),
  'LayerScale of another width': (
    'timm',
    also(blocks__0__ls1__gamma=one, blocks__1__ls1__gamma=one),
    'attention_scale has shape',
  ),
  'a gated MLP in one block': (
    'timm',
    also(blocks__0__mlp__fc1__weight=np.zeros((256, 32), np.float32)),
    'MlpBlock_3',
  ),
  'an unknown array': ('huggingface', also(vit__surprise=one), 'surprise'),
  'fused projections of another size': (
    'timm',
    also(blocks__0__attn__qkv__bias=np.zeros(97, np.float32)),
    r'blocks.0.attn.qkv.bias is \[97\].* 3 projections',
  ),
  'a projection twice': (
    'timm',
    also(blocks__0__attn__q__weight=np.eye(32, dtype=np.float32)),
    'qkv.weight',
  ),
  'a block twice': ('timm', also(blocks__00__norm1__weight=one), 'blocks.00.norm1.weight'),
  'a block in other digits': ('timm', also(blocks__١__norm1__weight=one), 'blocks'),
  'a layer twice': ('huggingface', also(layernorm__weight=one), 'layernorm.weight .*vit.'),
  'positions of another rank': (
    'timm',
    also(pos_embed=np.zeros((17, 32), np.float32)),
    'pos_embed .*3 axes',
  ),
  'no positions': ('timm', without('pos_embed'), 'no position embeddings'),
  'registers of another width': (
    'timm',
    also(reg_token=np.zeros((1, 4, 1), np.float32), pos_embed=np.zeros((1, 21, 32), np.float32)),
    r'registers are \[1, 4, 1\]',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_an_unsupported_model_raises_one_line_that_names_the_array(hub, case):
  format, change, message = WRONG[case]
  with pytest.raises(UserError, match=message) as error:
    hub(format, change)
  assert '\n' not in str(error.value)


# Changes of config.json.
CONFIG_ERRORS = {
  'heads that do not divide': ('huggingface', {'num_attention_heads': 5}, '5 heads'),
  'heads as text': ('huggingface', {'num_attention_heads': 'four'}, 'num_attention_heads .*four'),
  'heads below zero': ('timm', {'model_args': {'num_heads': -1}}, '-1 heads'),
  'another activation': ('huggingface', {'hidden_act': 'relu'}, 'relu'),
  'another activation of timm': (
    'timm',
    {'model_args': {'num_heads': 4, 'act_layer': 'silu'}},
    'silu',
  ),
  'another model type': ('huggingface', {'model_type': 'rf_detr_dinov2'}, 'rf_detr_dinov2'),
  'a model type as a number': ('huggingface', {'model_type': 1}, 'model_type is 1'),
  'no activation': ('huggingface', {'hidden_act': ['gelu']}, 'hidden_act'),
  'an epsilon as text': ('huggingface', {'layer_norm_eps': 'small'}, 'layer_norm_eps'),
  'labels without numbers': ('huggingface', {'id2label': {'cat': 0}}, 'id2label .*cat'),
  'a list of labels': ('huggingface', {'id2label': ['cat']}, 'id2label'),
  'the mean with a class token': (
    'timm',
    {'model_args': {'num_heads': 4, 'global_pool': 'avg'}},
    "global_pool='avg'",
  ),
  'registers pooled': (
    'timm',
    {'model_args': {'num_heads': 4, 'pool_include_prefix': True}},
    'pool_include_prefix',
  ),
  'another architecture of timm': ('timm', {'architecture': 'swin_tiny_patch4_224'}, 'swin_tiny'),
  'norms inside the attention': (
    'timm', {'architecture': 'eva02_base_patch16_clip_224'}, 'a norm inside the attention',
  ),
  'norms after the branches of EVA-02': (
    'timm', {'architecture': 'eva02_enormous_patch14_clip_224'}, 'norms after the branches',
  ),
  'positions counted along a rectangle': (
    'timm',
    {
      'architecture': 'eva02_tiny_patch14_224',
      'model_args': {'num_heads': 4, 'ref_feat_shape': [16, 8]},
    },
    'ref_feat_shape',
  ),
  'norms after the branches': (
    'timm',
    {'architecture': 'vit_base_patch16_rpn_224'},
    'ResPostBlock',
  ),
  'parallel blocks': ('timm', {'architecture': 'vit_base_patch16_18x2_224'}, 'other blocks'),
  'another norm': ('timm', {'model_args': {'num_heads': 4, 'norm_layer': 'rmsnorm'}}, 'norm_layer'),
  'another block': ('timm', {'model_args': {'num_heads': 4, 'block_fn': 'x'}}, "block_fn='x'"),
  'an architecture as a number': ('timm', {'architecture': 3}, 'architecture is 3'),
  'arguments in a list': ('timm', {'model_args': [4]}, r'model_args is \[4\]'),
  'two means': ('timm', {'pretrained_cfg': {'mean': [0.5, 0.4]}}, 'mean'),
  'a crop of nothing': (
    'timm',
    {'pretrained_cfg': {'input_size': [3, 32, 32], 'crop_pct': 0}},
    'crop_pct is 0',
  ),
  'a size of nothing': (
    'timm',
    {'model_args': {'img_size': 0, 'num_heads': 4}, 'pretrained_cfg': {'input_size': [3, 0, 0]}},
    'size',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', CONFIG_ERRORS)
def test_an_invalid_config_json_raises_one_line(hub, case):
  format, changes, message = CONFIG_ERRORS[case]
  with pytest.raises(UserError, match=message) as error:
    hub(format, config_changes=changes)
  assert '\n' not in str(error.value)


PREPROCESSORS = {
  'other factor': ({'rescale_factor': 1 / 127.5}, 'rescale_factor'),
  'no factor': ({'do_rescale': False, 'rescale_factor': None}, 'do_rescale=false'),
  'one mean': ({'image_mean': 0.5}, 'image_mean'),
  'half a size': ({'crop_size': {'height': 32}}, 'crop_size'),
}


@pytest.fixture
def preprocessed(tmp_path):
  """Return a function that exports a model, changes its preprocessor_config.json, and loads it."""

  def load(changes: dict, **overrides):
    export_model(model(), tmp_path / 'hub', 'huggingface')
    path = tmp_path / 'hub' / 'preprocessor_config.json'
    path.write_text(
      json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8'
    )
    return vit_jax.load(str(tmp_path / 'hub'), **overrides).preprocessing

  return load


@pytest.mark.parametrize('case', PREPROCESSORS)
def test_unsupported_preprocessing_raises(preprocessed, case):
  changes, message = PREPROCESSORS[case]
  with pytest.raises(UserError, match=message):
    preprocessed(changes)


def test_do_normalize_false_means_division_by_255(preprocessed):
  preprocessing = preprocessed({'do_normalize': False})
  assert (preprocessing.mean, preprocessing.scale) == ((0,) * 3, (255,) * 3)


@pytest.mark.parametrize(
  ('overrides', 'short_side'), [({}, 20), ({'size': 32}, 40), ({'size': 8}, 10)]
)
def test_the_stored_short_side_refers_to_the_crop_size(preprocessed, overrides, short_side):
  changes = {'size': {'shortest_edge': 20}, 'crop_size': {'height': 16, 'width': 16}}
  assert preprocessed(changes, **overrides).resize_size == (short_side, short_side)


def test_the_mask_token_is_ignored_with_a_note(hub):
  found = hub('timm', also(mask_token=np.zeros((1, 32), np.float32)))
  assert found.notes == ('mask_token, which only pre-training uses, is ignored',)


def test_an_unused_pooler_is_ignored_with_a_note(hub):
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  pooler = {
    'vit__pooler__dense__weight': np.eye(32, dtype=np.float32),
    'vit__pooler__dense__bias': np.ones(32, np.float32),
  }
  found = hub('huggingface', also(**pooler))
  assert len(found.notes) == 2
  assert all('which the classifier does not read' in note for note in found.notes)
  np.testing.assert_array_equal(found.logits(images), model().logits(images))


def test_older_timm_configs_with_one_level_are_read(hub):
  seen = {'mean': [0.1, 0.2, 0.3], 'std': [0.5] * 3, 'input_size': [3, 32, 32], 'crop_pct': 0.8}
  found = hub('timm', config_changes=seen | {'pretrained_cfg': None}).preprocessing
  assert (found.size, found.crop, found.resize_size) == ((32, 32), 'center', (40, 40))
  assert (found.mean, found.scale) == ((25.5, 51, 76.5), (127.5,) * 3)


def test_act_layer_takes_precedence_over_the_architecture(hub):
  tanh = {'architecture': 'vit_so400m_patch16_siglip_256', 'model_args': {'num_heads': 4}}
  assert hub('timm', config_changes=tanh).config.gelu == 'tanh'
  assert (
    hub(
      'timm', config_changes=tanh | {'model_args': {'num_heads': 4, 'act_layer': 'gelu'}}
    ).config.gelu
    == 'erf'
  )


def test_timm_rounds_every_crop_pct_down_to_the_same_short_side():
  sides = [(side, short) for side in range(16, 520, 8) for short in range(side, 2 * side)]
  assert all(math.floor(side / timm_crop_pct(side, short)) == short for side, short in sides)


@pytest.mark.parametrize('size', [(32, 32), (32, 48)])
@pytest.mark.parametrize(
  'fields', [{}, {'registers': 3}, {'registers': 3, 'pool': 'gap'}, {'registers': 1, 'pool': 'map'}]
)
def test_positions_survive_an_export_to_timm_with_any_extra_rows(tmp_path, size, fields):
  ours = model(size=size, **fields)
  export_model(ours, tmp_path / 'hub', 'timm')
  again = vit_jax.load(str(tmp_path / 'hub'))
  assert again.size == size
  before, after = (flax.traverse_util.flatten_dict(m.params, sep='/') for m in (ours, again))
  assert before.keys() == after.keys()
  for name, array in before.items():
    np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize('variant', ['R+Ti/16', 'R26+S/32'])
def test_hybrids_survive_an_export_to_timm_exactly(tmp_path, variant, timm):
  import torch

  ours = model(variant=variant, width=48, depth=1, mlp=96, heads=3, size=(64, 64))
  export_model(ours, tmp_path / 'hub', 'timm')
  again = vit_jax.load(str(tmp_path / 'hub'))
  before, after = (flax.traverse_util.flatten_dict(m.params, sep='/') for m in (ours, again))
  assert before.keys() == after.keys()
  for name, array in before.items():
    np.testing.assert_array_equal(after[name], array)
  theirs = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
  images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
  with torch.no_grad():
    expected = theirs(normalised(images, ours.config.mean, ours.config.scale)).numpy()
  # timm standardizes kernels and normalizes with other epsilons than the released code.
  np.testing.assert_allclose(
    ours.logits(images), expected, rtol=0, atol=1e-3 * np.abs(expected).max()
  )
  assert any("epsilons of the ResNet's norms" in note for note in again.notes)


def test_export_to_timm_rejects_other_stem_widths_and_epsilons():
  wrong = {
    'stem of 32': model(variant='R+Ti/16', stem_width=32, size=(64, 64)),
    'norm_eps': model(norm_eps=1e-4),
  }
  for message, ours in wrong.items():
    flat = flax.traverse_util.flatten_dict(ours.params, sep='/')
    with pytest.raises(UserError, match=message):
      to_timm(flat, ours.config, ours.preprocessing, ())


def written_by_timm(tmp_path, theirs, name: str, size: tuple[int, int]):
  """Save a timm model as timm's hub does, and load it."""
  seen = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'input_size': [3, *size], 'crop_pct': 1.0}
  config = {
    'architecture': name,
    'global_pool': theirs.global_pool,
    'model_args': {'num_heads': 3},
    'pretrained_cfg': seen,
  }
  save_file(
    {key: tensor.numpy() for key, tensor in theirs.state_dict().items()},
    tmp_path / 'model.safetensors',
  )
  (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  return vit_jax.load(str(tmp_path))


@pytest.mark.parametrize(
  'size', [(64, 64), (64, 96)]
)  # 64x96 has 24 patches, and with a class token 25: a square.
@pytest.mark.parametrize(
  'prefix', ['class token', 'class token without a position', 'registers', 'registers alone']
)
def test_positions_of_extra_tokens_are_those_of_timm(tmp_path, prefix, size, timm):
  kwargs = {
    'class token': {},
    'class token without a position': {'no_embed_class': True},
    'registers': {'reg_tokens': 1},
    'registers alone': {
      'reg_tokens': 4,
      'class_token': False,
      'global_pool': 'avg',
      'fc_norm': False,
    },
  }[prefix]
  small = {'img_size': size, 'embed_dim': 48, 'depth': 1, 'num_heads': 3, 'num_classes': 7}
  theirs = redrawn(timm.create_model('vit_base_patch16_224', **small, **kwargs))
  ours = written_by_timm(tmp_path, theirs, 'vit_base_patch16_224', size)
  images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  expected = run(theirs, images)
  np.testing.assert_allclose(
    ours.logits(images), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )


def test_hugging_face_models_of_non_square_images_compute_its_outputs(tmp_path, transformers):
  import torch

  sizes = {
    'hidden_size': 48,
    'num_hidden_layers': 1,
    'num_attention_heads': 3,
    'patch_size': 16,
    'num_labels': 7,
  }
  theirs = redrawn(
    transformers.ViTForImageClassification(transformers.ViTConfig(image_size=[64, 96], **sizes))
  )
  theirs.save_pretrained(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
  with torch.no_grad():
    expected = theirs(normalised(images)).logits.numpy()
  found = vit_jax.load(str(tmp_path), mean=0.5, std=0.5).logits(images)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_every_timm_vision_transformer_computes_its_outputs_or_raises_one_line(tmp_path, timm):
  modules = ('timm.models.vision_transformer', 'timm.models.deit')
  names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in modules]
  read = []
  for name in names:
    size = (56, 56) if 'patch14' in name else (64, 64)
    if name == 'vit_base_mci_224':  # Its width is fixed.
      continue
    theirs = redrawn(
      timm.create_model(name, img_size=size, embed_dim=48, depth=1, num_heads=3, num_classes=7)
    )
    try:
      ours = written_by_timm(tmp_path, theirs, name, size)
    except UserError as error:
      assert '\n' not in str(error), name
      continue
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = run(theirs, images)
    np.testing.assert_allclose(
      ours.logits(images), expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name
    )
    read.append(name)
  assert len(read) >= 85


@pytest.mark.parametrize(('format', 'prefix'), [('timm', 'decoder_'), ('huggingface', 'decoder.')])
def test_the_decoder_of_a_masked_autoencoder_is_ignored_and_noted(hub, format, prefix):
  plain = hub(format)
  decoder = {f'{prefix}{name}': one for name in ('embed.weight', 'pred.bias')} | {'mask_token': one}
  with_decoder = hub(format, lambda arrays: arrays.update(decoder))
  jax.tree.map(np.testing.assert_array_equal, with_decoder.params, plain.params)
  assert any('3 arrays that only pre-training uses' in note for note in with_decoder.notes)


def test_a_model_without_biases_of_queries_keys_and_values_has_no_such_parameters(hub):
  loaded = hub('timm', without(*QKV_BIAS))
  assert loaded.config.qkv_bias == 'none'
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  zeros = {name.replace('.', '__'): np.zeros(96, np.float32) for name in QKV_BIAS}
  np.testing.assert_allclose(
    loaded.logits(images), hub('timm', also(**zeros)).logits(images), rtol=1e-6, atol=1e-6
  )


def test_the_authors_names_of_a_gated_mlp_are_read(hub, tmp_path):
  """Fused as w12, with the gate first, and w3."""
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  ours = hub('timm', swiglu=True, layer_scale=1e-5)

  def rename(arrays):
    for old, new in (('fc1', 'w12'), ('fc2', 'w3')):
      for name in [name for name in arrays if f'.mlp.{old}.' in name]:
        arrays[name.replace(f'.{old}.', f'.{new}.')] = arrays.pop(name)

  again = hub('timm', rename, swiglu=True, layer_scale=1e-5)
  assert again.config.swiglu
  np.testing.assert_array_equal(again.logits(images), ours.logits(images))


def test_text_towers_and_classifiers_of_clip_are_ignored_and_refused(tmp_path, transformers):
  tower = {'hidden_size': 48, 'num_hidden_layers': 1, 'num_attention_heads': 3, 'image_size': 32}
  text = {'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'vocab_size': 99}
  text |= {'bos_token_id': 1, 'eos_token_id': 2}
  config = transformers.CLIPConfig(vision_config=tower, text_config=text, num_labels=3)
  transformers.CLIPModel(config).save_pretrained(tmp_path / 'clip')
  notes = vit_jax.load(str(tmp_path / 'clip')).notes
  assert any('text tower' in note for note in notes)
  assert any('visual_projection is the head' in note for note in notes)
  transformers.CLIPForImageClassification(config).save_pretrained(tmp_path / 'classifier')
  with pytest.raises(UserError, match='mean of the patches without'):
    vit_jax.load(str(tmp_path / 'classifier'))


def test_a_gated_dinov3_with_another_activation_than_silu_raises(tmp_path, transformers):
  sizes = {'hidden_size': 48, 'num_hidden_layers': 1, 'num_attention_heads': 3}
  config = transformers.DINOv3ViTConfig(**sizes, use_gated_mlp=True, hidden_act='gelu')
  transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
  with pytest.raises(UserError, match='expected silu'):
    vit_jax.load(str(tmp_path))


def test_rotary_positions_need_a_config_that_names_the_model(tmp_path, timm):
  sizes = {'embed_dim': 48, 'depth': 1, 'num_heads': 3, 'img_size': 32}
  theirs = timm.create_model('vit_small_patch16_dinov3', **sizes)
  arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
  save_file(arrays, tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='config.json has to name'):
    vit_jax.load(str(tmp_path))
