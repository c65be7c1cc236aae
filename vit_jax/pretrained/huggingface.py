"""Hugging Face's names (ViT, DINOv2 without and with registers, as their files have them) to our tree and back."""

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import shape
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.torch_names import ATTENTION, POSITION, Layout, count, heads_of, place_positions, shares, width_of

KEY = 'embeddings.patch_embeddings.projection.weight'
PREFIXES = ('', 'vit.', 'dinov2.', 'dinov2_with_registers.')  # Of the backbone in a model with a head.

TABLES = {
  'embeddings.cls_token': 'cls',
  'embeddings.position_embeddings': POSITION,
  'embeddings.register_tokens': 'registers',
}
TOP = {
  'embeddings.patch_embeddings.projection': ('embedding', 'conv'),
  'layernorm': ('Transformer/encoder_norm', 'norm'),
  'pooler.dense': ('pre_logits', 'dense'),
  'classifier': ('head', 'dense'),
}
ATTEND = {
  'attention.attention.query': (f'{ATTENTION}/query', 'in'),
  'attention.attention.key': (f'{ATTENTION}/key', 'in'),
  'attention.attention.value': (f'{ATTENTION}/value', 'in'),
  'attention.output.dense': (f'{ATTENTION}/out', 'out'),
}
VIT = Layout(
  TABLES,
  TOP,
  'encoder.layer.{}.',
  ATTEND
  | {
    'layernorm_before': ('LayerNorm_0', 'norm'),
    'layernorm_after': ('LayerNorm_2', 'norm'),
    'intermediate.dense': ('MlpBlock_3/Dense_0', 'dense'),
    'output.dense': ('MlpBlock_3/Dense_1', 'dense'),
  },
  {},
)
DINOV2 = Layout(
  TABLES,
  TOP,
  'encoder.layer.{}.',
  ATTEND
  | {
    'norm1': ('LayerNorm_0', 'norm'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  {'layer_scale1.lambda1': f'{ATTENTION}/out', 'layer_scale2.lambda1': 'MlpBlock_3/Dense_1'},
)
GELU = {'gelu': 'erf', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh'}
NORM_EPS = {'dinov2': 1e-6, 'dinov2_with_registers': 1e-6}  # Where config.json does not say; ViT's is 1e-12.
BILINEAR = 2  # Pillow's number of it.


def is_huggingface(arrays: Arrays) -> bool:
  """Whether the names are those of Hugging Face's transformers."""
  return any(prefix + KEY in arrays for prefix in PREFIXES)


def read_huggingface(
  arrays: Arrays, config: dict | None, preprocessor: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of the arrays, config.json and preprocessor_config.json."""
  config = config or {}
  prefix = next(prefix for prefix in PREFIXES if prefix + KEY in arrays)
  width = width_of(arrays, prefix + KEY)
  dino = any('.layer_scale1.' in name for name in arrays)
  if dino and 'classifier.weight' in arrays:
    raise UserError(
      f"{arrays.source} holds DINOv2's classifier, which reads the class token and the mean of the patches side by side: "
      'no head here does. Save its backbone alone (model.dinov2.save_pretrained), and fine-tune that'
    )
  left_out = [name for name in arrays if name.endswith('mask_token')]
  inside = Arrays(arrays.source, {n.removeprefix(prefix): arrays.header(n) for n in arrays if n not in left_out})
  heads = heads or config.get('num_attention_heads') or heads_of(width, count(inside, 'encoder.layer.'), arrays.source)
  flat = place_positions((DINOV2 if dino else VIT).read(inside, heads))
  notes = tuple(f'{name}, which only pre-training uses, is left out' for name in left_out)
  return flat, facts_of(config, dino) | preprocessing_of(preprocessor or {}) | {'notes': notes}


def facts_of(config: dict, dino: bool) -> dict:
  """What config.json says that arrays don't."""
  activation = config.get('hidden_act', 'gelu')
  if activation not in GELU:
    raise UserError(f'the activation {activation!r} is not among those here: {", ".join(GELU)}')
  eps = config.get('layer_norm_eps', NORM_EPS.get(config.get('model_type'), 1e-6 if dino else 1e-12))
  facts = {'gelu': GELU[activation], 'norm_eps': eps, 'positions': 'bicubic'}  # As transformers' own interpolation does.
  facts['assumed'] = () if config else ('gelu', 'norm_eps')
  names = config.get('id2label') or {}
  labels = tuple(names[key] for key in sorted(names, key=int))
  if labels and labels != tuple(f'LABEL_{i}' for i in range(len(labels))):
    facts['labels'] = labels
  return facts


def preprocessing_of(preprocessor: dict) -> dict:
  """What preprocessor_config.json says. UserError for a step that we don't have."""
  if abs(preprocessor.get('rescale_factor', 1 / 255) * 255 - 1) > 1e-6:
    raise UserError(f'preprocessor_config.json: rescale_factor={preprocessor["rescale_factor"]}, and only 1/255 is known here')
  names = {'mean': 'image_mean', 'scale': 'image_std'}
  facts = {ours: shares(preprocessor[theirs]) for ours, theirs in names.items() if theirs in preprocessor}
  size, crop = preprocessor.get('size'), preprocessor.get('crop_size')
  if preprocessor.get('do_center_crop') and crop:
    facts |= {'crop': 'center', 'wanted': sides(crop)}
    facts |= {'short_side': size['shortest_edge']} if isinstance(size, dict) and 'shortest_edge' in size else {}
  elif isinstance(size, int) or (isinstance(size, dict) and 'height' in size):
    facts |= {'crop': 'resize', 'wanted': sides(size)}
  return facts


def sides(size: int | dict) -> tuple[int, int]:
  """(height, width)."""
  return (size, size) if isinstance(size, int) else (size['height'], size['width'])


def to_huggingface(
  flat: dict[str, np.ndarray], config: ModelConfig, preprocessing: dict, labels: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict, dict]:
  """(arrays, config.json, preprocessor_config.json). UserError for what no model of theirs is."""
  head = 'head/kernel' in flat
  s = shape(config.variant, width=config.width, depth=config.depth, mlp=config.mlp, heads=config.heads)
  wrong = {
    f'pooling by {config.pool!r}': config.pool != 'token',
    'a ResNet stem': s.stem is not None,
    'norms around the patches': config.patch_norm,
    'fixed position embeddings': POSITION not in flat,
    'a hidden layer before a head': config.hidden_head and head,
    'registers and a head or hidden layer': config.registers > 0 and (head or config.hidden_head),
    'patches that are no squares': s.patch[0] != s.patch[1],
    'images that are no squares': preprocessing['size'][0] != preprocessing['size'][1],
  }
  if found := [what for what, is_so in wrong.items() if is_so]:
    raise UserError(f'no model of Hugging Face has {found[0]}')
  arrays = (DINOV2 if config.registers else VIT).write(flat)
  if config.registers:
    ones = np.ones(s.width, np.float32)
    arrays |= {f'encoder.layer.{i}.layer_scale{n}.lambda1': ones for i in range(s.depth) for n in (1, 2)}
    arrays['embeddings.mask_token'] = np.zeros((1, s.width), np.float32)
  if head:
    arrays = {name if name.startswith('classifier.') else f'vit.{name}': array for name, array in arrays.items()}
  return arrays, config_json(config, s, preprocessing, labels, flat), preprocessor_json(config, preprocessing)


def config_json(config: ModelConfig, s, preprocessing: dict, labels: tuple[str, ...], flat: dict[str, np.ndarray]) -> dict:
  """What `from_pretrained` builds the model from."""
  classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
  names = labels or tuple(f'LABEL_{i}' for i in range(classes))
  made = {
    'architectures': [
      'Dinov2WithRegistersModel' if config.registers else 'ViTForImageClassification' if classes else 'ViTModel'
    ],
    'model_type': 'dinov2_with_registers' if config.registers else 'vit',
    'hidden_size': s.width,
    'num_hidden_layers': s.depth,
    'num_attention_heads': s.heads,
    'hidden_act': {'erf': 'gelu', 'tanh': 'gelu_pytorch_tanh'}[config.gelu],
    'layer_norm_eps': config.norm_eps,
    'image_size': preprocessing['size'][0],
    'patch_size': s.patch[0],
    'num_channels': 3,
    'qkv_bias': True,
  }
  if config.registers:
    if s.mlp % s.width:
      raise UserError(f'no model of Hugging Face with registers has an MLP of {s.mlp} for a width of {s.width}')
    made |= {'num_register_tokens': config.registers, 'mlp_ratio': s.mlp // s.width, 'use_swiglu_ffn': False}
  else:
    made |= {'intermediate_size': s.mlp, 'pooler_act': 'tanh', 'pooler_output_size': s.width}
  if classes:
    made |= {'id2label': {str(i): name for i, name in enumerate(names)}, 'label2id': {name: i for i, name in enumerate(names)}}
  return made


def preprocessor_json(config: ModelConfig, preprocessing: dict) -> dict:
  """What an image goes through before it."""
  high, wide = preprocessing['size']
  center = preprocessing['crop'] == 'center'
  made = {
    'image_processor_type': 'BitImageProcessor' if center else 'ViTImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': preprocessing['short_side']} if center else {'height': high, 'width': wide},
    'resample': BILINEAR,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': [value / 255 for value in config.mean],
    'image_std': [value / 255 for value in config.scale],
  }
  return made | ({'do_center_crop': True, 'crop_size': {'height': high, 'width': wide}} if center else {})
