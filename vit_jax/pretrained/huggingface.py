"""Convert Hugging Face's ViT and DINOv2, with and without registers, to our tree and back."""

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.models.variants import ViTShape, vit_shape
from vit_jax.pretrained.arrays import (
  ATTENTION_MODULE,
  POSITION_EMBEDDING,
  LazyArrays,
  head_classes,
)
from vit_jax.pretrained.config_fields import NUMBER_TYPES, read_field, read_image_size
from vit_jax.pretrained.huggingface_preprocessing import (
  hf_preprocessor_json,
  read_hf_preprocessing,
)
from vit_jax.pretrained.torch_layout import (
  TorchLayout,
  index_count,
  infer_heads,
  normalize_position_rows,
  patch_count,
  patch_kernel_size,
)
from vit_jax.pretrained.unsupported import (
  check_supported,
  describe_ignored,
  is_pretraining_array,
)

HF_PATCH_WEIGHT = 'embeddings.patch_embeddings.projection.weight'
# Prefixes of the backbone. A model with a head has one.
HF_BACKBONE_PREFIXES = ('', 'vit.', 'dinov2.', 'dinov2_with_registers.', 'deit.', 'beit.')

HF_SINGLE_ARRAYS = {
  'embeddings.cls_token': 'cls',
  'embeddings.position_embeddings': POSITION_EMBEDDING,
  'embeddings.register_tokens': 'registers',
}
HF_TOP_NAMES = {
  'embeddings.patch_embeddings.projection': ('embedding', 'conv'),
  'layernorm': ('Transformer/encoder_norm', 'norm'),
  'pooler.dense': ('pre_logits', 'dense'),
  'classifier': ('head', 'dense'),
}
HF_ATTENTION_NAMES = {
  'attention.attention.query': (f'{ATTENTION_MODULE}/query', 'in'),
  'attention.attention.key': (f'{ATTENTION_MODULE}/key', 'in'),
  'attention.attention.value': (f'{ATTENTION_MODULE}/value', 'in'),
  'attention.output.dense': (f'{ATTENTION_MODULE}/out', 'out'),
}
HF_VIT_LAYOUT = TorchLayout(
  HF_SINGLE_ARRAYS,
  HF_TOP_NAMES,
  'encoder.layer.{}.',
  HF_ATTENTION_NAMES
  | {
    'layernorm_before': ('LayerNorm_0', 'norm'),
    'layernorm_after': ('LayerNorm_2', 'norm'),
    'intermediate.dense': ('MlpBlock_3/Dense_0', 'dense'),
    'output.dense': ('MlpBlock_3/Dense_1', 'dense'),
  },
  {},
)
HF_DINOV2_LAYOUT = TorchLayout(
  HF_SINGLE_ARRAYS,
  HF_TOP_NAMES,
  'encoder.layer.{}.',
  HF_ATTENTION_NAMES
  | {
    'norm1': ('LayerNorm_0', 'norm'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  {'layer_scale1.lambda1': f'{ATTENTION_MODULE}/out', 'layer_scale2.lambda1': 'MlpBlock_3/Dense_1'},
)
# Values of model_type whose function the arrays determine. Other models can have equal arrays, such
# as those with attention in windows.
HF_MODEL_TYPES = ('vit', 'vit_mae', 'vit_msn', 'deit', 'ijepa', 'dinov2', 'dinov2_with_registers')
HF_GELU = {'gelu': 'erf', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh'}
# Our facts -> fields of config.json that state them.
HF_FACT_FIELDS = {
  'gelu': 'hidden_act', 'norm_eps': 'layer_norm_eps', 'heads': 'num_attention_heads',
}  # fmt: skip
# Defaults of layer_norm_eps by model_type. ViT's default is 1e-12.
HF_DEFAULT_NORM_EPS = {'dinov2': 1e-6, 'dinov2_with_registers': 1e-6, 'vit_msn': 1e-6}


def is_huggingface(arrays: LazyArrays) -> bool:
  """Return whether a file contains a Vision Transformer in the names of transformers."""
  return any(prefix + HF_PATCH_WEIGHT in arrays for prefix in HF_BACKBONE_PREFIXES)


def read_huggingface(
  arrays: LazyArrays, config: dict | None, preprocessor: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """Read the arrays, config.json and preprocessor_config.json, and return the flat tree and facts.

  `heads` is the number of heads, or 0 to infer it. Raises UserError for an unsupported model.
  """
  config = config or {}
  check_model_type(config, arrays.source)
  prefix = next(prefix for prefix in HF_BACKBONE_PREFIXES if prefix + HF_PATCH_WEIGHT in arrays)
  width, patch = patch_kernel_size(arrays, prefix + HF_PATCH_WEIGHT)
  is_dinov2 = any('.layer_scale1.' in name for name in arrays)
  if is_dinov2 and 'classifier.weight' in arrays:
    raise UserError(
      f"{arrays.source} contains DINOv2's classifier, which reads the class token and the mean of "
      'the patches side by side. This head is not supported. Save only the backbone '
      '(model.dinov2.save_pretrained), and fine-tune that'
    )
  backbone, notes = select_backbone(arrays, prefix)
  check_supported(backbone, arrays.source)
  activation = read_field(config, 'pooler_act', str)
  if 'pooler.dense.weight' in backbone and activation not in (None, 'tanh'):
    raise UserError(f"{arrays.source}: pooler_act={activation!r} is not supported; expected 'tanh'")
  heads = heads or read_field(config, 'num_attention_heads', int)
  heads = infer_heads(heads, width, index_count(backbone, 'encoder.layer.'), arrays.source)
  facts = read_hf_config(config, is_dinov2)
  layout = HF_DINOV2_LAYOUT if is_dinov2 else HF_VIT_LAYOUT
  flat = layout.from_torch_arrays(backbone, heads)
  flat = normalize_position_rows(flat, patch_count(facts.get('size'), patch), arrays.source)
  steps = read_hf_preprocessing(preprocessor, config, is_dinov2=is_dinov2)
  assumed = (*facts['assumed'], *steps['assumed'])
  notes += steps.pop('notes', ())
  return flat, facts | steps | {'assumed': assumed, 'notes': notes}


def check_model_type(config: dict, source: str):
  """Raise UserError if config.json names another kind of model than those that are supported."""
  model_type = read_field(config, 'model_type', str)
  if model_type and model_type not in HF_MODEL_TYPES:
    raise UserError(
      f'{source}: config.json has model_type={model_type!r}, which is not supported; expected '
      f'{", ".join(HF_MODEL_TYPES)}'
    )


def select_backbone(arrays: LazyArrays, prefix: str) -> tuple[LazyArrays, tuple[str, ...]]:
  """Return the arrays without the backbone's prefix, and a note for each array that is ignored.

  Raises UserError if two arrays then have the same name.
  """
  ignored = [name for name in arrays if is_pretraining_array(name)]
  notes, headers = list(describe_ignored(ignored)), {}
  for name in arrays:
    short_name = name.removeprefix(prefix)
    if name in ignored:
      continue
    if short_name.startswith('pooler.') and 'classifier.weight' in arrays:
      notes.append(f'{name}, which the classifier does not read, is ignored')
    elif short_name in headers:
      raise UserError(f'{arrays.source} contains {short_name} with and without the prefix {prefix}')
    else:
      headers[short_name] = arrays.array_header(name)
  return LazyArrays(arrays.source, headers), tuple(notes)


def read_hf_config(config: dict, is_dinov2: bool) -> dict:
  """Return the facts in config.json."""
  activation = read_field(config, 'hidden_act', str) or 'gelu'
  if activation not in HF_GELU:
    raise UserError(
      f'config.json: hidden_act {activation!r} is not supported; expected {", ".join(HF_GELU)}'
    )
  eps = read_field(config, 'layer_norm_eps', NUMBER_TYPES)
  if eps is None:
    model_type = read_field(config, 'model_type', str)
    eps = HF_DEFAULT_NORM_EPS.get(model_type, 1e-6 if is_dinov2 else 1e-12)
  if eps < 0:
    raise UserError(f'config.json: layer_norm_eps is {eps}: expected a positive number')
  facts = {
    'gelu': HF_GELU[activation],
    'norm_eps': eps,
    'positions': 'bicubic',  # The interpolation of transformers.
    'assumed': tuple(name for name, field in HF_FACT_FIELDS.items() if config.get(field) is None),
  }
  if size := read_image_size(config.get('image_size'), 'image_size'):
    facts['size'] = size
  labels = read_id2label(read_field(config, 'id2label', dict) or {})
  if labels and labels != default_hf_labels(len(labels)):
    facts['labels'] = labels
  return facts


def read_id2label(id2label: dict[str, str]) -> tuple[str, ...]:
  """Return the labels in the order of the logits.

  Raises UserError unless the keys are the numbers from 0.
  """
  if id2label.keys() != {str(i) for i in range(len(id2label))}:
    keys = ', '.join(id2label)[:60]
    raise UserError(f'config.json: id2label has the keys {keys}: expected "0", "1" and so on')
  return tuple(str(id2label[str(i)]) for i in range(len(id2label)))


def default_hf_labels(classes: int) -> tuple[str, ...]:
  """Return the names that transformers gives to unnamed classes."""
  return tuple(f'LABEL_{i}' for i in range(classes))


def to_huggingface(
  flat: dict[str, np.ndarray],
  config: ModelConfig,
  preprocessing: Preprocessing,
  labels: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], dict, dict]:
  """Return arrays, config.json and preprocessor_config.json for `from_pretrained`.

  Raises UserError if no Hugging Face model is equivalent.
  """
  has_head = 'head/kernel' in flat
  s = vit_shape(
    config.variant, width=config.width, depth=config.depth, mlp=config.mlp, heads=config.heads
  )
  h, w = preprocessing.size
  unsupported = {
    f'pooling by {config.pool!r}': config.pool != 'token',
    'a ResNet stem': s.backbone is not None,
    'norms around the patches': config.patch_norm,
    'fixed position embeddings': POSITION_EMBEDDING not in flat,
    'a hidden layer before a head': config.hidden_head and has_head,
    'registers and a head or hidden layer': config.registers > 0
    and (has_head or config.hidden_head),
    'patches that are not square': s.patch[0] != s.patch[1],
    'images that are not square': h != w,
    f'registers and an MLP of {s.mlp} for a width of {s.width}': config.registers > 0
    and s.mlp % s.width != 0,
  }
  if problems := [feature for feature, present in unsupported.items() if present]:
    raise UserError(f'no Hugging Face model has {problems[0]}')
  layout = HF_DINOV2_LAYOUT if config.registers else HF_VIT_LAYOUT
  arrays = layout.to_torch_arrays(flat)
  if config.registers:  # DINOv2 also has layer scales and a mask token.
    ones = np.ones(s.width, np.float32)
    arrays |= {
      f'encoder.layer.{i}.layer_scale{n}.lambda1': ones for i in range(s.depth) for n in (1, 2)
    }
    arrays['embeddings.mask_token'] = np.zeros((1, s.width), np.float32)
  if has_head:
    arrays = {
      name if name.startswith('classifier.') else f'vit.{name}': array
      for name, array in arrays.items()
    }
  config_json = hf_config_json(config, s, h, labels, head_classes(flat))
  return arrays, config_json, hf_preprocessor_json(config, preprocessing)


def hf_config_json(
  config: ModelConfig, s: ViTShape, image_size: int, labels: tuple[str, ...], classes: int
) -> dict:
  """Return the config.json from which `from_pretrained` builds the model."""
  content = {
    'model_type': 'dinov2_with_registers' if config.registers else 'vit',
    'hidden_size': s.width,
    'num_hidden_layers': s.depth,
    'num_attention_heads': s.heads,
    'hidden_act': {'erf': 'gelu', 'tanh': 'gelu_pytorch_tanh'}[config.gelu],
    'layer_norm_eps': config.norm_eps,
    'image_size': image_size,
    'patch_size': s.patch[0],
    'num_channels': config.channels,
    'qkv_bias': True,
  }
  if config.registers:
    return content | {
      'architectures': ['Dinov2WithRegistersModel'],
      'num_register_tokens': config.registers,
      'mlp_ratio': s.mlp // s.width,
      'use_swiglu_ffn': False,
    }
  content |= {
    'architectures': ['ViTForImageClassification' if classes else 'ViTModel'],
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
