"""Convert timm's Vision Transformers to our parameter tree and back.

Supported: `vit_*` with hybrids, `deit_*`, `deit3_*`, DINO, DINOv2, DINOv3, CLIP, SigLIP, `beit_*`,
`beitv2_*`, `eva_*` and `eva02_*`, and the files of ViT-5, which have the same names.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.variants import ResNetBackbone
from vit_jax.pretrained.arrays import (
  ATTENTION_MODULE,
  POSITION_EMBEDDING,
  ArrayHeader,
  LazyArrays,
)
from vit_jax.pretrained.config_fields import read_field
from vit_jax.pretrained.fused_projections import split_fused_projections
from vit_jax.pretrained.preprocessing import describe_assumed_steps
from vit_jax.pretrained.timm_config import (
  EVA02_GRID,
  EVA02_MODELS,
  EVA02_THETA,
  EVA_MODELS,
  TIMM_HEADS,
  check_vit_config,
  is_dinov3,
  read_architecture,
)
from vit_jax.pretrained.timm_preprocessing import (
  read_timm_preprocessing,
  timm_defaults,
)
from vit_jax.pretrained.torch_families import (
  RELATIVE_INDEX,
  VIT5_FREQUENCIES,
  check_one_kind_of_positions,
  join_distilled_heads,
  pair_rotated_halves,
  read_vit5_facts,
  share_relative_table,
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

TIMM_PATCH_WEIGHT = 'patch_embed.proj.weight'
MAP_HEAD_ATTENTION = 'MAPHead_0/MultiHeadDotProductAttention_0'
TIMM_STEM_PREFIX = 'patch_embed.backbone.'

TIMM_LAYOUT = TorchLayout(
  single_arrays={
    'cls_token': 'cls',
    'dist_token': 'dist',
    'pos_embed': POSITION_EMBEDDING,
    'reg_token': 'registers',
    'attn_pool.latent': 'MAPHead_0/probe',
  },
  top_layers={
    'patch_embed.proj': ('embedding', 'conv'),
    'norm_pre': ('Transformer/pre_norm', 'norm'),
    'norm': ('Transformer/encoder_norm', 'norm'),
    'fc_norm': ('fc_norm', 'norm'),
    'pre_logits.fc': ('pre_logits', 'dense'),
    'head': ('head', 'dense'),
    'head_dist': ('head_dist', 'dense'),
    'attn_pool.q': (f'{MAP_HEAD_ATTENTION}/query', 'in'),
    'attn_pool.k': (f'{MAP_HEAD_ATTENTION}/key', 'in'),
    'attn_pool.v': (f'{MAP_HEAD_ATTENTION}/value', 'in'),
    'attn_pool.proj': (f'{MAP_HEAD_ATTENTION}/out', 'out'),
    'attn_pool.norm': ('MAPHead_0/LayerNorm_0', 'norm'),
    'attn_pool.mlp.fc1': ('MAPHead_0/MlpBlock_0/Dense_0', 'dense'),
    'attn_pool.mlp.fc2': ('MAPHead_0/MlpBlock_0/Dense_1', 'dense'),
    f'{TIMM_STEM_PREFIX}stem.conv': ('conv_root', 'conv'),
    f'{TIMM_STEM_PREFIX}stem.norm': ('gn_root', 'norm'),
  },
  block_prefix='blocks.{}.',
  block_layers={
    'norm1': ('LayerNorm_0', 'norm'),
    'attn.q_proj': (f'{ATTENTION_MODULE}/query', 'in'),
    'attn.k_proj': (f'{ATTENTION_MODULE}/key', 'in'),
    'attn.v_proj': (f'{ATTENTION_MODULE}/value', 'in'),
    'attn.q': (f'{ATTENTION_MODULE}/query', 'in'),
    'attn.k': (f'{ATTENTION_MODULE}/key', 'in'),
    'attn.v': (f'{ATTENTION_MODULE}/value', 'in'),
    'attn.q_norm': (f'{ATTENTION_MODULE}/query_norm', 'norm'),
    'attn.k_norm': (f'{ATTENTION_MODULE}/key_norm', 'norm'),
    'attn.proj': (f'{ATTENTION_MODULE}/out', 'out'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.norm': ('MlpBlock_3/hidden_norm', 'norm'),
    'mlp.w3': ('MlpBlock_3/Dense_1', 'dense'),
    'mlp.fc1_g': ('MlpBlock_3/Gate', 'dense'),
    'mlp.fc1_x': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  # Eva and Beit have the first names, and VisionTransformer the next.
  block_arrays={
    'gamma_1': 'attention_scale',
    'gamma_2': 'mlp_scale',
    'ls1.gamma': 'attention_scale',
    'ls2.gamma': 'mlp_scale',
    'attn.relative_position_bias_table': f'{ATTENTION_MODULE}/relative/table',
  },
)
# Layers of a unit of a hybrid's stem: our name -> (timm's name, kind).
TIMM_UNIT_NAMES = {
  **{f'conv{i}': (f'conv{i}', 'conv') for i in (1, 2, 3)},
  **{f'gn{i}': (f'norm{i}', 'norm') for i in (1, 2, 3)},
  'conv_proj': ('downsample.conv', 'conv'),
  'gn_proj': ('downsample.norm', 'norm'),
}
FUSED_PROJECTIONS = {
  'attn.qkv': ('attn.q', 'attn.k', 'attn.v'),
  'attn_pool.kv': ('attn_pool.k', 'attn_pool.v'),
}

# DINOv2-g has the gate and the other half of its MLP in one layer.
FUSED_SWIGLU = {'mlp.fc1': ('mlp.fc1_g', 'mlp.fc1_x')}
ORIGINAL_SWIGLU = {'mlp.w12': ('mlp.fc1_g', 'mlp.fc1_x')}  # In its authors' names.
# Arrays of timm's class Eva, whose models have equal arrays, but not equal positions.
EVA_ARRAYS = re.compile(r'blocks\.\d+\.(gamma_[12]|attn\.[qv]_bias|mlp\.fc1_g\.weight)')

# timm defines these models with the tanh approximation, and all others with erf (timm 1.0.31,
# models/vision_transformer.py).
TANH_GELU_MODELS = re.compile(
  r'vit_(base_patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512'
  r'|(so400m|giantopt)_patch16_siglip)'
)
REGISTER_POOLING_MODELS = ('test_vit3',)  # timm defines these with pool_include_prefix.
QUICK_GELU_MODELS = re.compile(r'vit_\w+_clip_quickgelu_\w+')
# timm defines these models with an epsilon of 1e-5.
LARGE_EPS_MODELS = re.compile(r'vit_\w+_(clip|dinov3)(_\w+)?')
TIMM_GELU = {'gelu': 'erf', 'gelu_tanh': 'tanh', 'quick_gelu': 'quick'}
VIT_FACT_ARGUMENTS = {
  'gelu': 'act_layer',
  'heads': 'num_heads',
}  # Facts -> arguments in model_args.
TIMM_POOL = {'token': 'token', 'gap': 'avg', 'map': 'map'}
TIMM_NORM_EPS = 1e-6
DINOV3_THETA = 100.0
# Biases that Eva and Beit store outside of their layers.
TIMM_BIAS = re.compile(r'\.(q|v)_bias')
SHARED_TABLE = 'rel_pos_bias.relative_position_bias_table'
TABLE_OF_BLOCK = 'blocks.{}.attn.relative_position_bias_table'
STEM_NOTE = (
  "the epsilons of the ResNet's norms are those of Google's code; timm has others, and its outputs "
  'differ by up to 3e-4 of the largest'
)


def is_timm(arrays: LazyArrays) -> bool:
  """Return whether a file contains a Vision Transformer in timm's names."""
  return TIMM_PATCH_WEIGHT in arrays


def read_timm(
  arrays: LazyArrays, config: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """Read timm's arrays and config.json, and return the flat tree and the facts.

  `heads` is the number of heads, or 0 to infer it. Raises UserError for an unsupported model.
  """
  width, patch = patch_kernel_size(arrays, TIMM_PATCH_WEIGHT)
  vit5 = read_vit5_facts(arrays, width)
  config = config or {}
  arguments = read_field(config, 'model_args', dict) or {}
  check_vit_config(config, arguments, arrays.source)
  pool, architecture = read_pool(arrays, config, arguments), read_architecture(config)
  check_positions_known(arrays, architecture, is_vit5=bool(vit5))
  split_arrays, notes = split_layers(arrays, is_vit5=bool(vit5))
  heads = heads or read_field(arguments, 'num_heads', int) or TIMM_HEADS.get(architecture)
  swiglu = any('.mlp.fc1_g.' in name for name in split_arrays)
  depth = index_count(arrays, 'blocks.')
  heads = infer_heads(heads or vit5.get('heads'), width, depth, arrays.source, swiglu=swiglu)
  flat = join_distilled_heads(add_stem_layers(arrays).from_torch_arrays(split_arrays, heads))
  check_one_kind_of_positions(flat, arrays.source)
  layer_scale = bool(vit5) or any(name.endswith('.ls1.gamma') for name in arrays)
  facts = read_timm_config(config, arguments, layer_scale=layer_scale) | {'pool': pool} | vit5
  if facts.get('position') == 'learned+rope':
    flat = pair_rotated_halves(flat)
  if swiglu and pool != 'map':
    del facts['gelu']
  notes += () if config else (describe_assumed_steps(facts, 'config.json'),)
  stride = 1
  if any(name.startswith(TIMM_STEM_PREFIX) for name in arrays):
    stages = index_count(arrays, f'{TIMM_STEM_PREFIX}stages.')
    stride = ResNetBackbone((0,) * stages, 0).stride
    notes += (STEM_NOTE,)
  patches = patch_count(facts.get('size'), (patch[0] * stride, patch[1] * stride))
  if facts.get('position') != 'rope':
    flat = normalize_position_rows(flat, patches, arrays.source)
  return flat, facts | {'notes': notes}


def split_layers(arrays: LazyArrays, *, is_vit5: bool) -> tuple[LazyArrays, tuple[str, ...]]:
  """Return the arrays with one name for each layer, and notes about those that are left out."""
  computed = [RELATIVE_INDEX, *([VIT5_FREQUENCIES] if is_vit5 else [])]
  ignored = [name for name in arrays if is_pretraining_array(name)]
  kept = [
    name
    for name in arrays
    if name not in ignored and not any(pattern.fullmatch(name) for pattern in computed)
  ]
  check_supported(kept, arrays.source)
  headers = {TIMM_BIAS.sub(r'.\1.bias', name): arrays.array_header(name) for name in kept}
  depth = index_count(arrays, 'blocks.')
  headers, notes = share_relative_table(
    headers, SHARED_TABLE, TABLE_OF_BLOCK, depth=depth, source=arrays.source
  )
  fused = FUSED_PROJECTIONS | ORIGINAL_SWIGLU | (FUSED_SWIGLU if has_fused_swiglu(headers) else {})
  headers = split_fused_projections(headers, fused, arrays.source)
  return LazyArrays(arrays.source, headers), (*describe_ignored(ignored), *notes)


def check_positions_known(arrays: LazyArrays, architecture: str, *, is_vit5: bool):
  """Raise UserError for arrays of timm's class Eva, unless it is known how they are positioned."""
  eva = [name for name in arrays if EVA_ARRAYS.fullmatch(name)]
  is_beit = any(name.endswith('relative_position_bias_table') for name in arrays)
  is_known = is_beit or is_vit5 or is_dinov3(architecture) or EVA_MODELS.fullmatch(architecture)
  if eva and not is_known:
    raise UserError(
      f"{arrays.source} contains {eva[0]}, an array of timm's Eva: of its models, only DINOv3, EVA "
      'and EVA-02 are supported, and config.json has to name one of them as the architecture'
    )


def eva02_positions(arguments: dict) -> dict:
  """Return the facts about the positions of EVA-02, given the arguments in its config.json."""
  grid = read_field(arguments, 'ref_feat_shape', list) or [EVA02_GRID] * 2
  if len(set(grid)) != 1:
    raise UserError(f'config.json: ref_feat_shape {grid} is not supported; expected a square')
  return {'position': 'learned+rope', 'rope_theta': EVA02_THETA, 'rope_grid': int(grid[0])}


def has_fused_swiglu(headers: Mapping[str, ArrayHeader]) -> bool:
  """Return whether the first layer of an MLP is twice as wide as the last expects."""
  first, last = (headers.get(f'blocks.0.mlp.{name}.weight') for name in ('fc1', 'fc2'))
  return bool(first and last) and first.shape[:1] == (2 * last.shape[-1],)


def read_pool(arrays: LazyArrays, config: dict, arguments: dict) -> str:
  """Return the pooling of the model. Raises UserError if it contradicts the arrays."""
  architecture = read_architecture(config)
  norms_mean = 'fc_norm.weight' in arrays or arguments.get('fc_norm') is False
  implied = 'map' if 'attn_pool.latent' in arrays else 'token' if 'cls_token' in arrays else 'avg'
  if implied == 'token' and 'fc_norm.weight' in arrays:
    implied = 'avg'
  pool = read_field(arguments, 'global_pool', str) or read_field(config, 'global_pool', str)
  pool = pool or ('avg' if is_dinov3(architecture) else implied)
  if pool != implied and not (pool == 'avg' and (norms_mean or is_dinov3(architecture))):
    raise UserError(
      f'{arrays.source}: config.json has global_pool={pool!r}, '
      f'but its arrays are supported only with {implied!r}'
    )
  pools_registers = read_field(arguments, 'pool_include_prefix', bool)
  if pools_registers is None:
    pools_registers = architecture in REGISTER_POOLING_MODELS
  if pools_registers:
    raise UserError(
      f'{arrays.source}: pooling over registers (pool_include_prefix) is not supported'
    )
  return {name: ours for ours, name in TIMM_POOL.items()}[pool]


def add_stem_layers(names: Collection[str]) -> TorchLayout:
  """Return timm's layout with the units of a hybrid's stem that occur in `names`.

  In a stem without stages, timm uses shorter names.
  """
  units = {}
  unit_pattern = re.compile(rf'{re.escape(TIMM_STEM_PREFIX)}stages\.(\d+)\.blocks\.(\d+)\.')
  for name in names:
    if match := unit_pattern.match(name):
      our_unit = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}'
      for our_layer, (layer, kind) in TIMM_UNIT_NAMES.items():
        units[match[0] + layer] = (f'{our_unit}/{our_layer}', kind)
  layers = TIMM_LAYOUT.top_layers | units
  if f'{TIMM_STEM_PREFIX}conv.weight' in names:
    long_prefix = f'{TIMM_STEM_PREFIX}stem.'
    layers = {name.replace(long_prefix, TIMM_STEM_PREFIX): ours for name, ours in layers.items()}
  return dataclasses.replace(TIMM_LAYOUT, top_layers=layers)


def read_timm_config(config: dict, arguments: dict, *, layer_scale: bool) -> dict:
  """Return the facts in timm's config.json, whose field model_args is `arguments`.

  `layer_scale` says that the arrays have layer scales, which some families are known by.
  """
  architecture = read_architecture(config)
  usual = 'gelu_tanh' if TANH_GELU_MODELS.match(architecture) else 'gelu'
  usual = 'quick_gelu' if QUICK_GELU_MODELS.fullmatch(architecture) else usual
  activation = read_field(arguments, 'act_layer', str) or usual
  if activation not in TIMM_GELU:
    raise UserError(
      f'config.json: act_layer {activation!r} is not supported; expected {", ".join(TIMM_GELU)}'
    )
  eps = 1e-5 if LARGE_EPS_MODELS.fullmatch(architecture) else TIMM_NORM_EPS
  facts = {'gelu': TIMM_GELU[activation], 'norm_eps': eps}
  facts |= {'position': 'rope', 'rope_theta': DINOV3_THETA} if is_dinov3(architecture) else {}
  facts |= eva02_positions(arguments) if EVA02_MODELS.fullmatch(architecture) else {}
  assumed = () if architecture else ('gelu', 'norm_eps', 'heads')
  assumed = tuple(name for name in assumed if VIT_FACT_ARGUMENTS.get(name) not in arguments)
  defaults = timm_defaults(config, layer_scale=layer_scale)
  steps = read_timm_preprocessing(config, arguments, defaults)
  return facts | steps | {'assumed': (*assumed, *steps['assumed'])}
