"""timm's names (`vit_*`, `deit_*`, DINO, DINOv2, SigLIP; hybrids too) to our tree and back."""

import math
import re

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import ResNetBackbone, ViTShape, vit_shape
from vit_jax.pretrained.arrays import ArrayHeader, LazyArrays
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

TIMM_PATCH_WEIGHT = 'patch_embed.proj.weight'
MAP_HEAD_ATTENTION = 'MAPHead_0/MultiHeadDotProductAttention_0'
TIMM_STEM_PREFIX = 'patch_embed.backbone.'

TIMM_LAYOUT = TorchLayout(
  tables={
    'cls_token': 'cls',
    'pos_embed': POSITION_EMBEDDING,
    'reg_token': 'registers',
    'attn_pool.latent': 'MAPHead_0/probe',
  },
  top={
    'patch_embed.proj': ('embedding', 'conv'),
    'norm': ('Transformer/encoder_norm', 'norm'),
    'pre_logits.fc': ('pre_logits', 'dense'),
    'head': ('head', 'dense'),
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
  block='blocks.{}.',
  layers={
    'norm1': ('LayerNorm_0', 'norm'),
    'attn.q': (f'{ATTENTION_MODULE}/query', 'in'),
    'attn.k': (f'{ATTENTION_MODULE}/key', 'in'),
    'attn.v': (f'{ATTENTION_MODULE}/value', 'in'),
    'attn.proj': (f'{ATTENTION_MODULE}/out', 'out'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  scales={'ls1.gamma': f'{ATTENTION_MODULE}/out', 'ls2.gamma': 'MlpBlock_3/Dense_1'},
)
# A unit of a stem's stage: {our name: theirs}.
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

# Other models by an array that only they have.
UNSUPPORTED_ARRAYS = {
  'dist_token': 'a distilled DeiT with its two heads',
  'fc_norm.weight': 'a model whose last norm comes after pooling',
  'norm_pre.weight': 'a model with a norm before the blocks, as CLIP has',
}
# These are defined with the tanh form (timm 1.0.31, models/vision_transformer.py); all others with erf.
TANH_GELU_MODELS = re.compile(
  r'vit_(base_patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512|(so400m|giantopt)_patch16_siglip)'
)
REGISTER_POOLING_MODELS = ('test_vit3',)  # Are defined with pool_include_prefix.
TIMM_GELU = {'gelu': 'erf', 'gelu_tanh': 'tanh'}
TIMM_POOL = {'token': 'token', 'gap': 'avg', 'map': 'map'}
TIMM_NORM_EPS = 1e-6
TIMM_HYBRIDS = {
  'R+Ti/16': 'vit_tiny_r_s16_p8_224',
  'R26+S/32': 'vit_small_r26_s32_224',
  'R50+B/16': 'vit_base_r50_s16_224',
  'R50+L/32': 'vit_large_r50_s32_224',
}


def is_timm(arrays: LazyArrays) -> bool:
  """Whether the names are timm's."""
  return TIMM_PATCH_WEIGHT in arrays


def read_timm(
  arrays: LazyArrays, config: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of timm's arrays and its config.json. UserError for a model that we are not."""
  for name, other in UNSUPPORTED_ARRAYS.items():
    if name in arrays:
      raise UserError(
        f'{arrays.source} holds {name}: it is {other}, which is not among the models here'
      )
  config = config or {}
  arguments = read_field(config, 'model_args', dict) or {}
  check_pooling(arrays, config, arguments)
  width, patch = patch_kernel_size(arrays, TIMM_PATCH_WEIGHT)
  heads = infer_heads(
    heads or read_field(arguments, 'num_heads', int),
    width,
    index_count(arrays, 'blocks.'),
    arrays.source,
  )
  kept = {name: arrays.header(name) for name in arrays if name != 'mask_token'}
  flat = add_stem_layers(arrays).read(
    LazyArrays(arrays.source, split_fused_projections(kept, arrays.source)), heads
  )
  facts = read_timm_config(config, arguments)
  step = (
    ResNetBackbone((0,) * index_count(arrays, f'{TIMM_STEM_PREFIX}stages.'), 0).stride
    if any(name.startswith(TIMM_STEM_PREFIX) for name in arrays)
    else 1
  )
  flat = normalize_position_rows(
    flat, patch_count(facts.get('size'), (patch[0] * step, patch[1] * step)), arrays.source
  )
  notes = (
    ('mask_token, which only pre-training uses, is left out',) if 'mask_token' in arrays else ()
  )
  return flat, facts | {'notes': notes}


def check_pooling(arrays: LazyArrays, config: dict, arguments: dict):
  """UserError where config.json says that the head reads something else than it does here with these arrays."""
  ours = 'map' if 'attn_pool.latent' in arrays else 'token' if 'cls_token' in arrays else 'avg'
  said = read_field(arguments, 'global_pool', str) or read_field(config, 'global_pool', str) or ours
  if said != ours:
    raise UserError(
      f'{arrays.source}: its config.json says global_pool={said!r}, and with these arrays only {ours!r} is known here'
    )
  over_registers = read_field(arguments, 'pool_include_prefix', bool)
  if over_registers is None:
    over_registers = read_field(config, 'architecture', str) in REGISTER_POOLING_MODELS
  if over_registers:
    raise UserError(
      f'{arrays.source}: its head reads registers (pool_include_prefix), and none here does'
    )


def split_fused_projections(headers: dict[str, ArrayHeader], source: str) -> dict[str, ArrayHeader]:
  """The fused projections one by one. UserError for one that does not divide, or that is there by itself too."""
  out = {}
  for name, header in headers.items():
    module, _, part = name.rpartition('.')
    fused = next(
      (fused for fused in FUSED_PROJECTIONS if module == fused or module.endswith('.' + fused)),
      None,
    )
    if fused is None:
      out[name] = header
      continue
    pieces = FUSED_PROJECTIONS[fused]
    if not header.shape or header.shape[0] % len(pieces):
      raise UserError(
        f'{source}: {name} is {list(header.shape)}: it does not divide into {len(pieces)} projections'
      )
    rows = header.shape[0] // len(pieces)
    for i, piece in enumerate(pieces):
      read = lambda header=header, i=i, rows=rows: header.read()[i * rows : (i + 1) * rows]
      made = f'{module.removesuffix(fused)}{piece}.{part}'
      if made in headers:
        raise UserError(f'{source} holds {made}, which {name} holds too')
      out[made] = ArrayHeader((rows, *header.shape[1:]), header.dtype, read)
  return out


def add_stem_layers(arrays) -> TorchLayout:
  """The layout with the units of a hybrid's stem, as many as there are. A stem without stages has shorter names."""
  units = {}
  for name in arrays:
    if match := re.match(rf'{re.escape(TIMM_STEM_PREFIX)}stages\.(\d+)\.blocks\.(\d+)\.', name):
      ours = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}'
      units |= {
        match[0] + theirs: (f'{ours}/{mine}', kind)
        for mine, (theirs, kind) in TIMM_UNIT_NAMES.items()
      }
  top = TIMM_LAYOUT.top | units
  if f'{TIMM_STEM_PREFIX}conv.weight' in arrays:
    top = {
      name.replace(f'{TIMM_STEM_PREFIX}stem.', TIMM_STEM_PREFIX): place
      for name, place in top.items()
    }
  return TorchLayout(
    TIMM_LAYOUT.tables, top, TIMM_LAYOUT.block, TIMM_LAYOUT.layers, TIMM_LAYOUT.scales
  )


def read_timm_config(config: dict, arguments: dict) -> dict:
  """What timm's config.json says that arrays don't."""
  tanh = TANH_GELU_MODELS.match(read_field(config, 'architecture', str) or '')
  activation = read_field(arguments, 'act_layer', str) or ('gelu_tanh' if tanh else 'gelu')
  if activation not in TIMM_GELU:
    raise UserError(
      f'the activation {activation!r} is not among those here: {", ".join(TIMM_GELU)}'
    )
  facts = {'gelu': TIMM_GELU[activation], 'norm_eps': TIMM_NORM_EPS}
  return (
    facts | {'assumed': () if config else tuple(facts)} | read_timm_preprocessing(config, arguments)
  )


def read_timm_preprocessing(config: dict, arguments: dict) -> dict:
  """What it says of images and labels."""
  facts = {}
  seen = (
    read_field(config, 'pretrained_cfg', dict) or config
  )  # Older files have it all at one level.
  statistics = {
    'mean': read_pixel_statistics(seen, 'mean'),
    'scale': read_pixel_statistics(seen, 'std'),
  }
  facts |= {name: value for name, value in statistics.items() if value}
  size = read_image_size(
    arguments.get('img_size') or (read_field(seen, 'input_size', list) or [])[1:] or None,
    'the size of an image',
  )
  if size:
    share = read_field(seen, 'crop_pct', NUMBER_TYPES)
    share = 1 if share is None else share
    if share <= 0:
      raise UserError(f'config.json: crop_pct is {share}: expected a positive number')
    facts |= {'size': size, 'crop': 'center' if share < 1 else 'resize'}
    facts |= {'short_side': math.floor(max(size) / share)} if share < 1 else {}
  labels = read_field(config, 'label_names', list) or read_field(seen, 'label_names', list)
  return facts | ({'labels': tuple(map(str, labels))} if labels else {})


def to_timm(
  flat: dict[str, np.ndarray], config: ModelConfig, preprocessing: dict, labels: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict]:
  """(arrays, config.json) for `timm.create_model('local-dir:…')`. UserError for what timm's Vision Transformer cannot be."""
  s = vit_shape(
    config.variant, width=config.width, depth=config.depth, mlp=config.mlp, heads=config.heads
  )
  wrong = {
    'no norms around its patches': config.patch_norm,
    'no hidden layer in its head': config.hidden_head,
    f'norms with an epsilon of {TIMM_NORM_EPS}, not {config.norm_eps}': config.norm_eps
    != TIMM_NORM_EPS,
    f'the hybrids {", ".join(TIMM_HYBRIDS)}, and no {config.variant}': s.stem is not None
    and config.variant not in TIMM_HYBRIDS,
    f'stems of 64 channels, not {config.stem_width}': s.stem is not None
    and config.stem_width != 64,
  }
  if found := [what for what, is_so in wrong.items() if is_so]:
    raise UserError(f"timm's Vision Transformer has {found[0]}")
  if config.registers and POSITION_EMBEDDING in flat:  # There, registers have positions too.
    table, d = flat[POSITION_EMBEDDING], flat[POSITION_EMBEDDING].shape[-1]
    first = int(config.pool == 'token')
    rows = [table[:, :first], np.zeros((1, config.registers, d), np.float32), table[:, first:]]
    flat = flat | {POSITION_EMBEDDING: np.concatenate(rows, axis=1)}
  stages = (
    [
      f'{TIMM_STEM_PREFIX}stages.{i}.blocks.{j}.'
      for i, n in enumerate(s.stem.blocks)
      for j in range(n)
    ]
    if s.stem
    else []
  )
  short = [f'{TIMM_STEM_PREFIX}conv.weight'] if s.stem and not s.stem.blocks else []
  arrays = fuse_projections(add_stem_layers([*stages, *short]).write(flat))
  return arrays, timm_config_json(flat, config, s, preprocessing, labels)


def timm_config_json(
  flat: dict[str, np.ndarray],
  config: ModelConfig,
  s: ViTShape,
  preprocessing: dict,
  labels: tuple[str, ...],
) -> dict:
  """What `create_model` builds the model from, and what an image goes through before it."""
  size, classes = (
    tuple(preprocessing['size']),
    flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0,
  )
  center = preprocessing['crop'] == 'center'
  arguments = {
    'img_size': list(size),
    'embed_dim': s.width,
    'depth': s.depth,
    'num_heads': s.heads,
    'mlp_ratio': s.mlp / s.width,
    'act_layer': {ours: theirs for theirs, ours in TIMM_GELU.items()}[config.gelu],
    'class_token': config.pool == 'token',
    'global_pool': TIMM_POOL[config.pool],
    'fc_norm': False,
    'reg_tokens': config.registers,
  }
  if not s.stem:
    arguments['patch_size'] = list(s.patch) if s.patch[0] != s.patch[1] else s.patch[0]
  seen = {
    'input_size': [3, *size],
    'interpolation': 'bilinear',
    'crop_pct': timm_crop_pct(max(size), preprocessing['short_side']) if center else 1.0,
    'crop_mode': 'center' if center else 'squash',
    'mean': [value / 255 for value in config.mean],
    'std': [value / 255 for value in config.scale],
    'num_classes': classes,
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
  }
  architecture = TIMM_HYBRIDS.get(config.variant, 'vit_base_patch16_224')
  made = {
    'architecture': architecture,
    'num_classes': classes,
    'num_features': s.width,
    'model_args': arguments,
  }
  return made | {'pretrained_cfg': seen} | ({'label_names': list(labels)} if labels else {})


def timm_crop_pct(side: int, short_side: int) -> float:
  """What a crop keeps of a short side: side / share, rounded down as timm does, is that short side again."""
  share = side / short_side
  return share if math.floor(side / share) == short_side else math.nextafter(share, 0)


def fuse_projections(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split_fused_projections`."""
  out = dict(arrays)
  for name in arrays:
    for fused, pieces in FUSED_PROJECTIONS.items():
      before, found, part = name.partition(pieces[0] + '.')
      if found and (not before or before.endswith('.')):
        out[f'{before}{fused}.{part}'] = np.concatenate(
          [out.pop(f'{before}{piece}.{part}') for piece in pieces]
        )
  return out
