"""Hugging Face's names (ViT, DINOv2 without and with registers, as their files have them) to our tree and back."""

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import vit_shape
from vit_jax.pretrained.arrays import LazyArrays
from vit_jax.pretrained.torch_layout import (
  ATTENTION_MODULE,
  NUMBER_TYPES,
  POSITION_EMBEDDING,
  TorchLayout,
  index_count,
  infer_heads,
  normalize_position_rows,
  patch_count,
  patch_kernel_size,
  read_field,
  read_image_size,
  read_pixel_statistics,
)

HF_PATCH_WEIGHT = 'embeddings.patch_embeddings.projection.weight'
HF_BACKBONE_PREFIXES = (
  '',
  'vit.',
  'dinov2.',
  'dinov2_with_registers.',
)  # Of the backbone in a model with a head.

HF_TABLES = {
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
  HF_TABLES,
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
  HF_TABLES,
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
HF_GELU = {'gelu': 'erf', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh'}
HF_DEFAULT_NORM_EPS = {
  'dinov2': 1e-6,
  'dinov2_with_registers': 1e-6,
}  # Where config.json does not say; ViT's is 1e-12.
PIL_BILINEAR = 2  # Pillow's number of it.
PREPROCESSOR_FILE = 'preprocessor_config.json'
PIXEL_STATISTICS = {'mean': 'mean', 'scale': 'std'}  # Ours, theirs.


def is_huggingface(arrays: LazyArrays) -> bool:
  """Whether the names are those of Hugging Face's transformers."""
  return any(prefix + HF_PATCH_WEIGHT in arrays for prefix in HF_BACKBONE_PREFIXES)


def read_huggingface(
  arrays: LazyArrays, config: dict | None, preprocessor: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of the arrays, config.json and preprocessor_config.json."""
  config = config or {}
  prefix = next(prefix for prefix in HF_BACKBONE_PREFIXES if prefix + HF_PATCH_WEIGHT in arrays)
  width, patch = patch_kernel_size(arrays, prefix + HF_PATCH_WEIGHT)
  dino = any('.layer_scale1.' in name for name in arrays)
  if dino and 'classifier.weight' in arrays:
    raise UserError(
      f"{arrays.source} holds DINOv2's classifier, which reads the class token and the mean of the patches side by side: "
      'no head here does. Save its backbone alone (model.dinov2.save_pretrained), and fine-tune that'
    )
  inside, notes = select_backbone(arrays, prefix)
  if 'pooler.dense.weight' in inside and read_field(config, 'pooler_act', str) not in (
    None,
    'tanh',
  ):
    raise UserError(
      f'{arrays.source}: pooler_act is {config["pooler_act"]!r}, and only tanh is known here'
    )
  heads = infer_heads(
    heads or read_field(config, 'num_attention_heads', int),
    width,
    index_count(inside, 'encoder.layer.'),
    arrays.source,
  )
  facts = read_hf_config(config, dino)
  flat = (HF_DINOV2_LAYOUT if dino else HF_VIT_LAYOUT).read(inside, heads)
  flat = normalize_position_rows(flat, patch_count(facts.get('size'), patch), arrays.source)
  return flat, facts | read_hf_preprocessor(preprocessor or {}, facts.get('size')) | {
    'notes': notes
  }


def select_backbone(arrays: LazyArrays, prefix: str) -> tuple[LazyArrays, tuple[str, ...]]:
  """(the arrays by their names in the backbone, a line for each that is left out). UserError where two have one name."""
  notes, kept = [], {}
  for name in arrays:
    inside = name.removeprefix(prefix)
    if name.endswith('mask_token'):
      notes.append(f'{name}, which only pre-training uses, is left out')
    elif inside.startswith('pooler.') and 'classifier.weight' in arrays:
      notes.append(f'{name}, which the classifier does not read, is left out')
    elif inside in kept:
      raise UserError(f'{arrays.source} holds {inside} with and without {prefix} before it')
    else:
      kept[inside] = arrays.header(name)
  return LazyArrays(arrays.source, kept), tuple(notes)


def read_hf_config(config: dict, dino: bool) -> dict:
  """What config.json says that arrays don't."""
  activation = read_field(config, 'hidden_act', str) or 'gelu'
  if activation not in HF_GELU:
    raise UserError(f'the activation {activation!r} is not among those here: {", ".join(HF_GELU)}')
  eps = read_field(config, 'layer_norm_eps', NUMBER_TYPES)
  usual = HF_DEFAULT_NORM_EPS.get(read_field(config, 'model_type', str), 1e-6 if dino else 1e-12)
  facts = {'gelu': HF_GELU[activation], 'norm_eps': usual if eps is None else eps}
  facts['positions'] = 'bicubic'  # As transformers' own interpolation does.
  facts['assumed'] = () if config else ('gelu', 'norm_eps')
  if size := read_image_size(config.get('image_size'), 'image_size'):
    facts['size'] = size
  labels = read_id2label(read_field(config, 'id2label', dict) or {})
  return facts | ({'labels': labels} if labels and labels != default_hf_labels(len(labels)) else {})


def read_id2label(names: dict[str, str]) -> tuple[str, ...]:
  """In the order of the logits. UserError where they are not numbered from 0."""
  if names.keys() != {str(i) for i in range(len(names))}:
    raise UserError(
      f'config.json: id2label has the keys {", ".join(names)[:60]}: expected "0", "1" and so on'
    )
  return tuple(str(names[str(i)]) for i in range(len(names)))


def default_hf_labels(classes: int) -> tuple[str, ...]:
  """What transformers calls classes that nobody named."""
  return tuple(f'LABEL_{i}' for i in range(classes))


def read_hf_preprocessor(preprocessor: dict, native: tuple[int, int] | None) -> dict:
  """What preprocessor_config.json says, for a model whose positions are for images of `native`.

  A short side is said for images of the size that is cropped, and told in proportion to `native`. UserError for a step that
  we don't have.
  """
  says = lambda name, kind: read_field(preprocessor, name, kind, PREPROCESSOR_FILE)
  sides = lambda name: read_image_size(preprocessor.get(name), name, PREPROCESSOR_FILE)
  factor = says('rescale_factor', NUMBER_TYPES)
  if says('do_rescale', bool) is False or (factor is not None and abs(factor * 255 - 1) > 1e-6):
    got = 'do_rescale=false' if factor is None else f'rescale_factor={factor}'
    raise UserError(f'{PREPROCESSOR_FILE}: {got}, and only pixels times 1/255 are known here')
  if says('do_normalize', bool) is False:
    facts = {'mean': (0.0,) * 3, 'scale': (255.0,) * 3}
  else:
    shares = {
      ours: read_pixel_statistics(preprocessor, f'image_{theirs}', PREPROCESSOR_FILE)
      for ours, theirs in PIXEL_STATISTICS.items()
    }
    facts = {name: values for name, values in shares.items() if values}
  size = preprocessor.get('size') or None
  edge = (
    read_field(size, 'shortest_edge', int, PREPROCESSOR_FILE) if isinstance(size, dict) else None
  )
  if not says('do_center_crop', bool) or not preprocessor.get('crop_size'):
    return facts | ({'crop': 'resize', 'wanted': sides('size')} if size and not edge else {})
  wanted = sides('crop_size')
  short = edge or (min(sides('size')) if size else None)
  if short and native and native != wanted:
    short = round(short * max(native) / max(wanted))
  return facts | {'crop': 'center', 'wanted': wanted} | ({'short_side': short} if short else {})


def to_huggingface(
  flat: dict[str, np.ndarray], config: ModelConfig, preprocessing: dict, labels: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict, dict]:
  """(arrays, config.json, preprocessor_config.json). UserError for what no model of theirs is."""
  head = 'head/kernel' in flat
  s = vit_shape(
    config.variant, width=config.width, depth=config.depth, mlp=config.mlp, heads=config.heads
  )
  wrong = {
    f'pooling by {config.pool!r}': config.pool != 'token',
    'a ResNet stem': s.stem is not None,
    'norms around the patches': config.patch_norm,
    'fixed position embeddings': POSITION_EMBEDDING not in flat,
    'a hidden layer before a head': config.hidden_head and head,
    'registers and a head or hidden layer': config.registers > 0 and (head or config.hidden_head),
    'patches that are no squares': s.patch[0] != s.patch[1],
    'images that are no squares': preprocessing['size'][0] != preprocessing['size'][1],
  }
  if found := [what for what, is_so in wrong.items() if is_so]:
    raise UserError(f'no model of Hugging Face has {found[0]}')
  arrays = (HF_DINOV2_LAYOUT if config.registers else HF_VIT_LAYOUT).write(flat)
  if config.registers:
    ones = np.ones(s.width, np.float32)
    arrays |= {
      f'encoder.layer.{i}.layer_scale{n}.lambda1': ones for i in range(s.depth) for n in (1, 2)
    }
    arrays['embeddings.mask_token'] = np.zeros((1, s.width), np.float32)
  if head:
    arrays = {
      name if name.startswith('classifier.') else f'vit.{name}': array
      for name, array in arrays.items()
    }
  return (
    arrays,
    hf_config_json(config, s, preprocessing, labels, flat),
    hf_preprocessor_json(config, preprocessing),
  )


def hf_config_json(
  config: ModelConfig, s, preprocessing: dict, labels: tuple[str, ...], flat: dict[str, np.ndarray]
) -> dict:
  """What `from_pretrained` builds the model from."""
  classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
  names = labels or default_hf_labels(classes)
  made = {
    'architectures': [
      'Dinov2WithRegistersModel'
      if config.registers
      else 'ViTForImageClassification'
      if classes
      else 'ViTModel'
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
      raise UserError(
        f'no model of Hugging Face with registers has an MLP of {s.mlp} for a width of {s.width}'
      )
    made |= {
      'num_register_tokens': config.registers,
      'mlp_ratio': s.mlp // s.width,
      'use_swiglu_ffn': False,
    }
  else:
    made |= {'intermediate_size': s.mlp, 'pooler_act': 'tanh', 'pooler_output_size': s.width}
  if classes:
    made |= {
      'id2label': {str(i): name for i, name in enumerate(names)},
      'label2id': {name: i for i, name in enumerate(names)},
    }
  return made


def hf_preprocessor_json(config: ModelConfig, preprocessing: dict) -> dict:
  """What an image goes through before it."""
  high, wide = preprocessing['size']
  center = preprocessing['crop'] == 'center'
  made = {
    'image_processor_type': 'BitImageProcessor' if center else 'ViTImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': preprocessing['short_side']}
    if center
    else {'height': high, 'width': wide},
    'resample': PIL_BILINEAR,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': [value / 255 for value in config.mean],
    'image_std': [value / 255 for value in config.scale],
  }
  return made | (
    {'do_center_crop': True, 'crop_size': {'height': high, 'width': wide}} if center else {}
  )
