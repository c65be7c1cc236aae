"""Read Vision Transformers of transformers.

These are ViT, DeiT, BEiT, DINOv2, DINOv3, and the image towers of CLIP and SigLIP.
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import (
  ArrayHeader,
  LazyArrays,
)
from vit_jax.pretrained.config_fields import NUMBER_TYPES, read_field, read_image_size
from vit_jax.pretrained.fused_projections import reshape_header, split_fused_projections
from vit_jax.pretrained.huggingface_layouts import (
  DINOV2,
  DINOV3,
  SHARED_TABLE,
  TABLE_OF_BLOCK,
  TOWER_LAYOUT,
  HuggingFaceFamily,
  find_family,
)
from vit_jax.pretrained.huggingface_preprocessing import (
  read_hf_preprocessing,
)
from vit_jax.pretrained.torch_families import (
  RELATIVE_INDEX,
  check_one_kind_of_positions,
  join_distilled_heads,
  share_relative_table,
)
from vit_jax.pretrained.torch_layout import (
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

# Values of model_type whose function the arrays determine. Other models can have equal arrays, such
# as those with attention in windows.
HF_MODEL_TYPES = (
  'vit', 'vit_mae', 'vit_msn', 'deit', 'ijepa', 'dinov2', 'dinov2_with_registers', 'dinov3_vit',
  'beit', 'data2vec-vision', 'clip', 'clip_vision_model', 'siglip', 'siglip_vision_model',
)  # fmt: skip
DINOV3_THETA = 100.0
HF_GELU = {'gelu': 'erf', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'quick_gelu': 'quick'}
# Our facts -> fields of config.json that state them.
HF_FACT_FIELDS = {
  'gelu': 'hidden_act', 'norm_eps': 'layer_norm_eps', 'heads': 'num_attention_heads',
}  # fmt: skip
# Arrays of CLIP and SigLIP outside the image tower.
TEXT_ARRAYS = re.compile(r'text_model\.|text_projection\.|logit_scale|logit_bias')
# Tables of an image tower -> their axes in the file. Ours have three.
TOWER_TABLES = {'embeddings.class_embedding': 1, 'embeddings.position_embedding.weight': 2}


def is_huggingface(arrays: LazyArrays) -> bool:
  """Return whether a file contains a Vision Transformer in the names of transformers."""
  return find_family(arrays) is not None


def read_huggingface(
  arrays: LazyArrays, config: dict | None, preprocessor: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """Read the arrays, config.json and preprocessor_config.json, and return the flat tree and facts.

  `heads` is the number of heads, or 0 to infer it. Raises UserError for an unsupported model.
  """
  config = config or {}
  check_model_type(config, arrays.source)
  family, prefix = find_family(arrays)
  check_classifier(arrays, family)
  width, patch = patch_kernel_size(arrays, prefix + family.patch_weight)
  backbone, notes = select_backbone(arrays, prefix, family)
  check_supported(backbone, arrays.source)
  # CLIP and SigLIP have a config for each of their towers.
  tower = read_field(config, 'vision_config', dict) or config
  activation = read_field(tower, 'pooler_act', str)
  if 'pooler.dense.weight' in backbone and activation not in (None, 'tanh'):
    raise UserError(f"{arrays.source}: pooler_act={activation!r} is not supported; expected 'tanh'")
  swiglu = any('.mlp.gate_proj.' in name for name in backbone)
  facts = read_hf_config(config, tower, family, swiglu=swiglu)
  heads = heads or read_field(tower, 'num_attention_heads', int)
  depth = index_count(backbone, family.layout.block_prefix.partition('{}')[0])
  heads = infer_heads(heads, width, depth, arrays.source, swiglu=swiglu)
  flat = join_distilled_heads(family.layout.from_torch_arrays(backbone, heads))
  check_one_kind_of_positions(flat, arrays.source)
  if 'registers' in flat and not flat['registers'].size:  # DINOv3 without registers has an array.
    del flat['registers']
  if not family.rope:
    flat = normalize_position_rows(flat, patch_count(facts.get('size'), patch), arrays.source)
  if 'head/kernel' in flat and 'head/bias' not in flat:
    flat['head/bias'] = np.zeros(flat['head/kernel'].shape[-1], np.float32)
    notes += ('visual_projection is the head: its outputs are the image embeddings',)
  steps = read_hf_preprocessing(preprocessor, config, is_dinov2=family is DINOV2)
  assumed = (*facts['assumed'], *steps['assumed'])
  notes += steps.pop('notes', ())
  return flat, facts | steps | {'assumed': assumed, 'notes': notes}


def check_classifier(arrays: LazyArrays, family: HuggingFaceFamily):
  """Raise UserError for a classifier that reads other features than our head does."""
  if family.classifier and 'classifier.weight' in arrays:
    raise UserError(
      f'{arrays.source} contains a classifier that reads {family.classifier}. This head is not '
      'supported. Save only the backbone (such as model.dinov2.save_pretrained), and fine-tune that'
    )


def check_model_type(config: dict, source: str):
  """Raise UserError if config.json names another kind of model than those that are supported."""
  model_type = read_field(config, 'model_type', str)
  if model_type and model_type not in HF_MODEL_TYPES:
    raise UserError(
      f'{source}: config.json has model_type={model_type!r}, which is not supported; expected '
      f'{", ".join(HF_MODEL_TYPES)}'
    )


def select_backbone(
  arrays: LazyArrays, prefix: str, family: HuggingFaceFamily
) -> tuple[LazyArrays, tuple[str, ...]]:
  """Return the arrays under the layout's names, and a note for each array that is ignored.

  Raises UserError if two arrays then have the same name.
  """
  ignored = [name for name in arrays if is_pretraining_array(name)]
  text = [name for name in arrays if TEXT_ARRAYS.match(name)] if prefix == 'vision_model.' else []
  notes, headers = list(describe_ignored(ignored)), {}
  notes += [f'{len(text)} arrays of the text tower are ignored'] if text else []
  for name in arrays:
    short_name = name.removeprefix(prefix)
    if name in ignored or name in text or RELATIVE_INDEX.fullmatch(name):
      continue
    if short_name.startswith('pooler.dense.') and 'classifier.weight' in arrays:
      notes.append(f'{name}, which the classifier does not read, is ignored')
    elif short_name in headers:
      raise UserError(f'{arrays.source} contains {short_name} with and without the prefix {prefix}')
    else:
      headers[short_name] = arrays.array_header(name)
  if family is DINOV3:  # Its blocks have a prefix in some files.
    headers = {re.sub(r'^model\.(layer\.)', r'\1', name): row for name, row in headers.items()}
  if family.layout is TOWER_LAYOUT:
    headers = {
      re.sub(r'\.in_proj_(weight|bias)$', r'.in_proj.\1', name): add_axes(name, header)
      for name, header in headers.items()
    }
  depth = index_count(headers, family.layout.block_prefix.partition('{}')[0])
  headers, table_notes = share_relative_table(
    headers, SHARED_TABLE, TABLE_OF_BLOCK, depth=depth, source=arrays.source
  )
  headers = split_fused_projections(headers, family.fused, arrays.source)
  return LazyArrays(arrays.source, headers), (*notes, *table_notes)


def add_axes(name: str, header: ArrayHeader) -> ArrayHeader:
  """Give the class token [d] and the position embeddings [n, d] of CLIP and SigLIP three axes."""
  if name not in TOWER_TABLES or len(header.shape) != TOWER_TABLES[name]:
    return header
  return reshape_header(header, (1,) * (3 - len(header.shape)) + header.shape)


def read_hf_config(config: dict, tower: dict, family: HuggingFaceFamily, *, swiglu: bool) -> dict:
  """Return the facts in config.json, of which `tower` describes the image tower."""
  activation = read_field(tower, 'hidden_act', str) or family.hidden_act
  known = ('silu',) if swiglu and family is DINOV3 else tuple(HF_GELU)
  if activation not in known:
    raise UserError(
      f'config.json: hidden_act {activation!r} is not supported; expected {", ".join(known)}'
    )
  eps = read_field(tower, 'layer_norm_eps', NUMBER_TYPES)
  if eps is None:
    eps = 1e-6 if read_field(config, 'model_type', str) == 'vit_msn' else family.norm_eps
  if eps < 0:
    raise UserError(f'config.json: layer_norm_eps is {eps}: expected a positive number')
  facts = {
    'norm_eps': eps,
    'positions': 'bicubic',  # The interpolation of transformers.
    'assumed': tuple(name for name, field in HF_FACT_FIELDS.items() if tower.get(field) is None),
  }
  if not swiglu:
    facts['gelu'] = HF_GELU[activation]
  if family.rope:
    theta = read_field(tower, 'rope_theta', NUMBER_TYPES) or DINOV3_THETA
    facts |= {'position': 'rope', 'rope_theta': float(theta)}
  if size := read_image_size(tower.get('image_size'), 'image_size'):
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
