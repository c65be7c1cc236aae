"""Convert our tree to the models of transformers: ViT, distilled DeiT, DINOv2 and DINOv3."""

import dataclasses
from collections.abc import Callable

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.models.attention import BIASED_PROJECTIONS
from vit_jax.models.variants import ViTShape, vit_shape
from vit_jax.pretrained.arrays import POSITION_EMBEDDING, head_classes
from vit_jax.pretrained.equivalents import (
  OPTIONAL_BIASES,
  add_zero_biases,
  match_optional_arrays,
  to_plain,
)
from vit_jax.pretrained.huggingface import HF_GELU, default_hf_labels
from vit_jax.pretrained.huggingface_layouts import DINOV2_LAYOUT, DINOV3_LAYOUT, VIT_LAYOUT
from vit_jax.pretrained.huggingface_preprocessing import hf_preprocessor_json
from vit_jax.pretrained.torch_families import split_distilled_head
from vit_jax.pretrained.torch_layout import TorchLayout

HF_CLASSES = {  # model_type -> the classes without and with a head.
  'vit': ('ViTModel', 'ViTForImageClassification'),
  'deit': ('DeiTModel', 'DeiTForImageClassificationWithTeacher'),
}
SCALES = tuple(f'Transformer/encoderblock/{name}' for name in ('attention_scale', 'mlp_scale'))
DINO_KINDS = ('dinov2', 'dinov2_with_registers', 'dinov3_vit')
MLP_RATIOS = range(1, 17)  # Integers, as DINOv2's config.json has them.


def to_huggingface(
  flat: dict[str, np.ndarray],
  config: ModelConfig,
  preprocessing: Preprocessing,
  labels: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], dict, dict]:
  """Return arrays, config.json and preprocessor_config.json for `from_pretrained`.

  Raises UserError if no Hugging Face model is equivalent.
  """
  c, has_head = config, 'head/kernel' in flat
  numbers = {'width': c.width, 'depth': c.depth, 'mlp': c.mlp, 'heads': c.heads}
  s = vit_shape(c.variant, **numbers, swiglu=c.swiglu)
  kind = choose_kind(c, has_head)
  check_supported(flat, c, s, kind, size=preprocessing.size)
  flat = add_zero_biases(flat, ['embedding/bias'])
  convert, layout = KINDS[kind]
  if s.swiglu and kind != 'dinov3_vit':
    layout = without_layers(layout, 'mlp.fc1', 'mlp.fc2', 'mlp.weights_out')
  arrays = layout.to_torch_arrays(split_distilled_head(convert(flat)))
  if kind in DINO_KINDS:
    axes = (1, 1) if kind == 'dinov3_vit' else (1,)
    if not c.registers and kind == 'dinov3_vit':
      arrays['embeddings.register_tokens'] = np.zeros((1, 0, s.width), np.float32)
    arrays['embeddings.mask_token'] = np.zeros((*axes, s.width), np.float32)
  if has_head:
    arrays = {
      name if 'classifier.' in name else f'{kind}.{name}': array for name, array in arrays.items()
    }
  config_json = hf_config_json(c, s, preprocessing.size[0], labels, head_classes(flat))
  return arrays, config_json, hf_preprocessor_json(c, preprocessing)


def without_layers(layout: TorchLayout, *names: str) -> TorchLayout:
  """Return the layout without some layers of a block, where several have one name of ours."""
  layers = {name: row for name, row in layout.block_layers.items() if name not in names}
  return dataclasses.replace(layout, block_layers=layers)


def choose_kind(config: ModelConfig, has_head: bool) -> str:
  """Return the model_type of transformers that has the blocks of the model."""
  if config.distillation_token:
    return 'deit'
  if config.position == 'rope':
    return 'dinov3_vit'
  if config.registers:
    return 'dinov2_with_registers'
  return 'dinov2' if config.swiglu or (config.layer_scale and not has_head) else 'vit'


def check_supported(
  flat: dict[str, np.ndarray], c: ModelConfig, s: ViTShape, kind: str, *, size: tuple[int, int]
):
  """Raise UserError with the first feature of the model that its kind lacks."""
  extras = {
    'registers': c.registers > 0,
    'rotary positions': c.position == 'rope',
    'SwiGLU': c.swiglu,
  }
  extra = next((name for name, present in extras.items() if present), '')
  is_dino = kind in DINO_KINDS
  unsupported = {
    f'pooling by {c.pool!r}': c.pool != 'token',
    'a ResNet stem': s.backbone is not None,
    'norms around the patches': c.patch_norm,
    'a norm inside the MLP': c.mlp_norm,
    'RMSNorm': c.norm != 'layernorm',
    'learned and rotary positions': c.position == 'learned+rope',
    'rotary positions that count patches or registers': c.rope_grid or c.rope_register_theta,
    f'a distillation token and {extra}': bool(extra) and kind == 'deit',
    'a norm before the blocks and a class token': c.pre_norm,
    'norms of queries and keys': c.qk_norm,
    'fixed position embeddings': POSITION_EMBEDDING not in flat and c.position != 'rope',
    'a hidden layer before a head': c.hidden_head and 'head/kernel' in flat,
    'a hidden layer of two tokens': c.hidden_head and c.distillation_token,
    f'{extra} and a head or hidden layer': is_dino and ('head/kernel' in flat or c.hidden_head),
    'patches that are not square': s.patch[0] != s.patch[1],
    'images that are not square': size[0] != size[1],
    f'{extra} and an MLP of {s.mlp} for a width of {s.width}': kind.startswith('dinov2')
    and dinov2_mlp_ratio(s) is None,
  }
  if problems := [feature for feature, present in unsupported.items() if present]:
    raise UserError(f'no Hugging Face model has {problems[0]}')


def dinov2_mlp_ratio(s: ViTShape) -> int | None:
  """Return the mlp_ratio of DINOv2 that gives the MLP its width, or None if none does."""

  def hidden(ratio: int) -> int:
    return (s.width * ratio * 2 // 3 + 7) // 8 * 8 if s.swiglu else s.width * ratio

  return next((ratio for ratio in MLP_RATIOS if hidden(ratio) == s.mlp), None)


def with_layer_scale(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return an equivalent flat tree with LayerScale, which DINOv2 and DINOv3 always have."""
  return match_optional_arrays(flat, [*flat, *SCALES])


def with_layer_scale_and_biases(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return an equivalent flat tree with LayerScale and all biases, as DINOv2 has them."""
  return add_zero_biases(with_layer_scale(flat), OPTIONAL_BIASES)


# Its head has another name, since there are two.
DEIT_LAYOUT = dataclasses.replace(
  VIT_LAYOUT,
  top_layers={name: row for name, row in VIT_LAYOUT.top_layers.items() if name != 'classifier'},
)
# model_type -> rewrite of the flat tree, layout.
KINDS: dict[str, tuple[Callable, TorchLayout]] = {
  'vit': (to_plain, VIT_LAYOUT),
  'deit': (to_plain, DEIT_LAYOUT),
  'dinov2': (with_layer_scale_and_biases, DINOV2_LAYOUT),
  'dinov2_with_registers': (with_layer_scale_and_biases, DINOV2_LAYOUT),
  'dinov3_vit': (with_layer_scale, DINOV3_LAYOUT),
}


def hf_config_json(
  config: ModelConfig, s: ViTShape, image_size: int, labels: tuple[str, ...], classes: int
) -> dict:
  """Return the config.json from which `from_pretrained` builds the model."""
  kind = choose_kind(config, classes > 0)
  content = {
    'model_type': kind,
    'hidden_size': s.width,
    'num_hidden_layers': s.depth,
    'num_attention_heads': s.heads,
    'hidden_act': {ours: name for name, ours in HF_GELU.items()}[config.gelu],
    'layer_norm_eps': config.norm_eps,
    'image_size': image_size,
    'patch_size': s.patch[0],
    'num_channels': config.channels,
    'qkv_bias': True,
  }
  if kind == 'dinov3_vit':
    content |= {'architectures': ['DINOv3ViTModel'], 'intermediate_size': s.mlp}
    content |= {'num_register_tokens': config.registers, 'rope_theta': config.rope_theta}
    content |= {'use_gated_mlp': s.swiglu} | ({'hidden_act': 'silu'} if s.swiglu else {})
    biases = BIASED_PROJECTIONS[config.qkv_bias]
    content |= {f'{name}_bias': name in biases for name in ('query', 'key', 'value')}
    return content
  if kind in DINO_KINDS:
    registers = {'num_register_tokens': config.registers} if config.registers else {}
    name = 'Dinov2WithRegistersModel' if registers else 'Dinov2Model'
    content |= {'architectures': [name], 'use_swiglu_ffn': s.swiglu} | registers
    return content | {'mlp_ratio': dinov2_mlp_ratio(s)}
  content |= {
    'architectures': [HF_CLASSES[kind][bool(classes)]],
    'intermediate_size': s.mlp,
    'pooler_act': 'tanh',
    'pooler_output_size': s.width,
  }
  if classes:
    names = labels or default_hf_labels(classes)
    content |= {
      'id2label': {str(i): name for i, name in enumerate(names)},
      'label2id': {name: i for i, name in enumerate(names)},
    }
  return content
