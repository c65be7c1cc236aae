"""Hugging Face's names (ViT, DINOv2 without and with registers, as their files have them) to our tree and back."""

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import vit_shape
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.torch_names import (
  ATTENTION,
  NUMERIC,
  POSITION,
  Layout,
  count,
  heads_of,
  patch_of,
  patches_of,
  place_positions,
  told,
  told_shares,
  told_sides,
)

KEY = 'embeddings.patch_embeddings.projection.weight'
PREFIXES = (
  '',
  'vit.',
  'dinov2.',
  'dinov2_with_registers.',
)  # Of the backbone in a model with a head.

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
NORM_EPS = {
  'dinov2': 1e-6,
  'dinov2_with_registers': 1e-6,
}  # Where config.json does not say; ViT's is 1e-12.
BILINEAR = 2  # Pillow's number of it.
PREPROCESSOR = 'preprocessor_config.json'
STATISTICS = {'mean': 'mean', 'scale': 'std'}  # Ours, theirs.


def is_huggingface(arrays: Arrays) -> bool:
  """Whether the names are those of Hugging Face's transformers."""
  return any(prefix + KEY in arrays for prefix in PREFIXES)


def read_huggingface(
  arrays: Arrays, config: dict | None, preprocessor: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of the arrays, config.json and preprocessor_config.json."""
  config = config or {}
  prefix = next(prefix for prefix in PREFIXES if prefix + KEY in arrays)
  width, patch = patch_of(arrays, prefix + KEY)
  dino = any('.layer_scale1.' in name for name in arrays)
  if dino and 'classifier.weight' in arrays:
    raise UserError(
      f"{arrays.source} holds DINOv2's classifier, which reads the class token and the mean of the patches side by side: "
      'no head here does. Save its backbone alone (model.dinov2.save_pretrained), and fine-tune that'
    )
  inside, notes = backbone(arrays, prefix)
  if 'pooler.dense.weight' in inside and told(config, 'pooler_act', str) not in (None, 'tanh'):
    raise UserError(
      f'{arrays.source}: pooler_act is {config["pooler_act"]!r}, and only tanh is known here'
    )
  heads = heads_of(
    heads or told(config, 'num_attention_heads', int),
    width,
    count(inside, 'encoder.layer.'),
    arrays.source,
  )
  facts = facts_of(config, dino)
  flat = (DINOV2 if dino else VIT).read(inside, heads)
  flat = place_positions(flat, patches_of(facts.get('size'), patch), arrays.source)
  return flat, facts | preprocessing_of(preprocessor or {}, facts.get('size')) | {'notes': notes}


def backbone(arrays: Arrays, prefix: str) -> tuple[Arrays, tuple[str, ...]]:
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
  return Arrays(arrays.source, kept), tuple(notes)


def facts_of(config: dict, dino: bool) -> dict:
  """What config.json says that arrays don't."""
  activation = told(config, 'hidden_act', str) or 'gelu'
  if activation not in GELU:
    raise UserError(f'the activation {activation!r} is not among those here: {", ".join(GELU)}')
  eps = told(config, 'layer_norm_eps', NUMERIC)
  usual = NORM_EPS.get(told(config, 'model_type', str), 1e-6 if dino else 1e-12)
  facts = {'gelu': GELU[activation], 'norm_eps': usual if eps is None else eps}
  facts['positions'] = 'bicubic'  # As transformers' own interpolation does.
  facts['assumed'] = () if config else ('gelu', 'norm_eps')
  if size := told_sides(config.get('image_size'), 'image_size'):
    facts['size'] = size
  labels = labels_of(told(config, 'id2label', dict) or {})
  return facts | ({'labels': labels} if labels and labels != unnamed(len(labels)) else {})


def labels_of(names: dict[str, str]) -> tuple[str, ...]:
  """In the order of the logits. UserError where they are not numbered from 0."""
  if names.keys() != {str(i) for i in range(len(names))}:
    raise UserError(
      f'config.json: id2label has the keys {", ".join(names)[:60]}: expected "0", "1" and so on'
    )
  return tuple(str(names[str(i)]) for i in range(len(names)))


def unnamed(classes: int) -> tuple[str, ...]:
  """What transformers calls classes that nobody named."""
  return tuple(f'LABEL_{i}' for i in range(classes))


def preprocessing_of(preprocessor: dict, native: tuple[int, int] | None) -> dict:
  """What preprocessor_config.json says, for a model whose positions are for images of `native`.

  A short side is said for images of the size that is cropped, and told in proportion to `native`. UserError for a step that
  we don't have.
  """
  says = lambda name, kind: told(preprocessor, name, kind, PREPROCESSOR)
  sides = lambda name: told_sides(preprocessor.get(name), name, PREPROCESSOR)
  factor = says('rescale_factor', NUMERIC)
  if says('do_rescale', bool) is False or (factor is not None and abs(factor * 255 - 1) > 1e-6):
    got = 'do_rescale=false' if factor is None else f'rescale_factor={factor}'
    raise UserError(f'{PREPROCESSOR}: {got}, and only pixels times 1/255 are known here')
  if says('do_normalize', bool) is False:
    facts = {'mean': (0.0,) * 3, 'scale': (255.0,) * 3}
  else:
    shares = {
      ours: told_shares(preprocessor, f'image_{theirs}', PREPROCESSOR)
      for ours, theirs in STATISTICS.items()
    }
    facts = {name: values for name, values in shares.items() if values}
  size = preprocessor.get('size') or None
  edge = told(size, 'shortest_edge', int, PREPROCESSOR) if isinstance(size, dict) else None
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
    config_json(config, s, preprocessing, labels, flat),
    preprocessor_json(config, preprocessing),
  )


def config_json(
  config: ModelConfig, s, preprocessing: dict, labels: tuple[str, ...], flat: dict[str, np.ndarray]
) -> dict:
  """What `from_pretrained` builds the model from."""
  classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
  names = labels or unnamed(classes)
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


def preprocessor_json(config: ModelConfig, preprocessing: dict) -> dict:
  """What an image goes through before it."""
  high, wide = preprocessing['size']
  center = preprocessing['crop'] == 'center'
  made = {
    'image_processor_type': 'BitImageProcessor' if center else 'ViTImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': preprocessing['short_side']}
    if center
    else {'height': high, 'width': wide},
    'resample': BILINEAR,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': [value / 255 for value in config.mean],
    'image_std': [value / 255 for value in config.scale],
  }
  return made | (
    {'do_center_crop': True, 'crop_size': {'height': high, 'width': wide}} if center else {}
  )
