"""timm's names (`vit_*`, `deit_*`, DINO, DINOv2, SigLIP; hybrids too) to our tree and back."""

import math
import re

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import ResNetBackbone, ViTShape, vit_shape
from vit_jax.pretrained.arrays import Arrays, Header
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

KEY = 'patch_embed.proj.weight'
MAP = 'MAPHead_0/MultiHeadDotProductAttention_0'
STEM = 'patch_embed.backbone.'

TIMM = Layout(
  tables={
    'cls_token': 'cls',
    'pos_embed': POSITION,
    'reg_token': 'registers',
    'attn_pool.latent': 'MAPHead_0/probe',
  },
  top={
    'patch_embed.proj': ('embedding', 'conv'),
    'norm': ('Transformer/encoder_norm', 'norm'),
    'pre_logits.fc': ('pre_logits', 'dense'),
    'head': ('head', 'dense'),
    'attn_pool.q': (f'{MAP}/query', 'in'),
    'attn_pool.k': (f'{MAP}/key', 'in'),
    'attn_pool.v': (f'{MAP}/value', 'in'),
    'attn_pool.proj': (f'{MAP}/out', 'out'),
    'attn_pool.norm': ('MAPHead_0/LayerNorm_0', 'norm'),
    'attn_pool.mlp.fc1': ('MAPHead_0/MlpBlock_0/Dense_0', 'dense'),
    'attn_pool.mlp.fc2': ('MAPHead_0/MlpBlock_0/Dense_1', 'dense'),
    f'{STEM}stem.conv': ('conv_root', 'conv'),
    f'{STEM}stem.norm': ('gn_root', 'norm'),
  },
  block='blocks.{}.',
  layers={
    'norm1': ('LayerNorm_0', 'norm'),
    'attn.q': (f'{ATTENTION}/query', 'in'),
    'attn.k': (f'{ATTENTION}/key', 'in'),
    'attn.v': (f'{ATTENTION}/value', 'in'),
    'attn.proj': (f'{ATTENTION}/out', 'out'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  scales={'ls1.gamma': f'{ATTENTION}/out', 'ls2.gamma': 'MlpBlock_3/Dense_1'},
)
# A unit of a stem's stage: {our name: theirs}.
UNIT = {
  **{f'conv{i}': (f'conv{i}', 'conv') for i in (1, 2, 3)},
  **{f'gn{i}': (f'norm{i}', 'norm') for i in (1, 2, 3)},
  'conv_proj': ('downsample.conv', 'conv'),
  'gn_proj': ('downsample.norm', 'norm'),
}
FUSED = {'attn.qkv': ('attn.q', 'attn.k', 'attn.v'), 'attn_pool.kv': ('attn_pool.k', 'attn_pool.v')}

# Other models by an array that only they have.
OTHERS = {
  'dist_token': 'a distilled DeiT with its two heads',
  'fc_norm.weight': 'a model whose last norm comes after pooling',
  'norm_pre.weight': 'a model with a norm before the blocks, as CLIP has',
}
# These are defined with the tanh form (timm 1.0.31, models/vision_transformer.py); all others with erf.
TANH = re.compile(
  r'vit_(base_patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512|(so400m|giantopt)_patch16_siglip)'
)
OVER_REGISTERS = ('test_vit3',)  # Are defined with pool_include_prefix.
GELU = {'gelu': 'erf', 'gelu_tanh': 'tanh'}
POOL = {'token': 'token', 'gap': 'avg', 'map': 'map'}
NORM_EPS = 1e-6
HYBRIDS = {
  'R+Ti/16': 'vit_tiny_r_s16_p8_224',
  'R26+S/32': 'vit_small_r26_s32_224',
  'R50+B/16': 'vit_base_r50_s16_224',
  'R50+L/32': 'vit_large_r50_s32_224',
}


def is_timm(arrays: Arrays) -> bool:
  """Whether the names are timm's."""
  return KEY in arrays


def read_timm(
  arrays: Arrays, config: dict | None, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of timm's arrays and its config.json. UserError for a model that we are not."""
  for name, other in OTHERS.items():
    if name in arrays:
      raise UserError(
        f'{arrays.source} holds {name}: it is {other}, which is not among the models here'
      )
  config = config or {}
  arguments = told(config, 'model_args', dict) or {}
  refuse_other_pooling(arrays, config, arguments)
  width, patch = patch_of(arrays, KEY)
  heads = heads_of(
    heads or told(arguments, 'num_heads', int), width, count(arrays, 'blocks.'), arrays.source
  )
  kept = {name: arrays.header(name) for name in arrays if name != 'mask_token'}
  flat = with_stem(arrays).read(Arrays(arrays.source, split(kept, arrays.source)), heads)
  facts = facts_of(config, arguments)
  step = (
    ResNetBackbone((0,) * count(arrays, f'{STEM}stages.'), 0).stride
    if any(name.startswith(STEM) for name in arrays)
    else 1
  )
  flat = place_positions(
    flat, patches_of(facts.get('size'), (patch[0] * step, patch[1] * step)), arrays.source
  )
  notes = (
    ('mask_token, which only pre-training uses, is left out',) if 'mask_token' in arrays else ()
  )
  return flat, facts | {'notes': notes}


def refuse_other_pooling(arrays: Arrays, config: dict, arguments: dict):
  """UserError where config.json says that the head reads something else than it does here with these arrays."""
  ours = 'map' if 'attn_pool.latent' in arrays else 'token' if 'cls_token' in arrays else 'avg'
  said = told(arguments, 'global_pool', str) or told(config, 'global_pool', str) or ours
  if said != ours:
    raise UserError(
      f'{arrays.source}: its config.json says global_pool={said!r}, and with these arrays only {ours!r} is known here'
    )
  over_registers = told(arguments, 'pool_include_prefix', bool)
  if over_registers is None:
    over_registers = told(config, 'architecture', str) in OVER_REGISTERS
  if over_registers:
    raise UserError(
      f'{arrays.source}: its head reads registers (pool_include_prefix), and none here does'
    )


def split(headers: dict[str, Header], source: str) -> dict[str, Header]:
  """The fused projections one by one. UserError for one that does not divide, or that is there by itself too."""
  out = {}
  for name, header in headers.items():
    module, _, part = name.rpartition('.')
    fused = next(
      (fused for fused in FUSED if module == fused or module.endswith('.' + fused)), None
    )
    if fused is None:
      out[name] = header
      continue
    pieces = FUSED[fused]
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
      out[made] = Header((rows, *header.shape[1:]), header.dtype, read)
  return out


def with_stem(arrays) -> Layout:
  """The layout with the units of a hybrid's stem, as many as there are. A stem without stages has shorter names."""
  units = {}
  for name in arrays:
    if match := re.match(rf'{re.escape(STEM)}stages\.(\d+)\.blocks\.(\d+)\.', name):
      ours = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}'
      units |= {
        match[0] + theirs: (f'{ours}/{mine}', kind) for mine, (theirs, kind) in UNIT.items()
      }
  top = TIMM.top | units
  if f'{STEM}conv.weight' in arrays:
    top = {name.replace(f'{STEM}stem.', STEM): place for name, place in top.items()}
  return Layout(TIMM.tables, top, TIMM.block, TIMM.layers, TIMM.scales)


def facts_of(config: dict, arguments: dict) -> dict:
  """What timm's config.json says that arrays don't."""
  tanh = TANH.match(told(config, 'architecture', str) or '')
  activation = told(arguments, 'act_layer', str) or ('gelu_tanh' if tanh else 'gelu')
  if activation not in GELU:
    raise UserError(f'the activation {activation!r} is not among those here: {", ".join(GELU)}')
  facts = {'gelu': GELU[activation], 'norm_eps': NORM_EPS}
  return facts | {'assumed': () if config else tuple(facts)} | image_facts(config, arguments)


def image_facts(config: dict, arguments: dict) -> dict:
  """What it says of images and labels."""
  facts = {}
  seen = told(config, 'pretrained_cfg', dict) or config  # Older files have it all at one level.
  statistics = {'mean': told_shares(seen, 'mean'), 'scale': told_shares(seen, 'std')}
  facts |= {name: value for name, value in statistics.items() if value}
  size = told_sides(
    arguments.get('img_size') or (told(seen, 'input_size', list) or [])[1:] or None,
    'the size of an image',
  )
  if size:
    share = told(seen, 'crop_pct', NUMERIC)
    share = 1 if share is None else share
    if share <= 0:
      raise UserError(f'config.json: crop_pct is {share}: expected a positive number')
    facts |= {'size': size, 'crop': 'center' if share < 1 else 'resize'}
    facts |= {'short_side': math.floor(max(size) / share)} if share < 1 else {}
  labels = told(config, 'label_names', list) or told(seen, 'label_names', list)
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
    f'norms with an epsilon of {NORM_EPS}, not {config.norm_eps}': config.norm_eps != NORM_EPS,
    f'the hybrids {", ".join(HYBRIDS)}, and no {config.variant}': s.stem is not None
    and config.variant not in HYBRIDS,
    f'stems of 64 channels, not {config.stem_width}': s.stem is not None
    and config.stem_width != 64,
  }
  if found := [what for what, is_so in wrong.items() if is_so]:
    raise UserError(f"timm's Vision Transformer has {found[0]}")
  if config.registers and POSITION in flat:  # There, registers have positions too.
    table, d = flat[POSITION], flat[POSITION].shape[-1]
    first = int(config.pool == 'token')
    rows = [table[:, :first], np.zeros((1, config.registers, d), np.float32), table[:, first:]]
    flat = flat | {POSITION: np.concatenate(rows, axis=1)}
  stages = (
    [f'{STEM}stages.{i}.blocks.{j}.' for i, n in enumerate(s.stem.blocks) for j in range(n)]
    if s.stem
    else []
  )
  short = [f'{STEM}conv.weight'] if s.stem and not s.stem.blocks else []
  arrays = merge(with_stem([*stages, *short]).write(flat))
  return arrays, config_json(flat, config, s, preprocessing, labels)


def config_json(
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
    'act_layer': {ours: theirs for theirs, ours in GELU.items()}[config.gelu],
    'class_token': config.pool == 'token',
    'global_pool': POOL[config.pool],
    'fc_norm': False,
    'reg_tokens': config.registers,
  }
  if not s.stem:
    arguments['patch_size'] = list(s.patch) if s.patch[0] != s.patch[1] else s.patch[0]
  seen = {
    'input_size': [3, *size],
    'interpolation': 'bilinear',
    'crop_pct': crop_share(max(size), preprocessing['short_side']) if center else 1.0,
    'crop_mode': 'center' if center else 'squash',
    'mean': [value / 255 for value in config.mean],
    'std': [value / 255 for value in config.scale],
    'num_classes': classes,
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
  }
  architecture = HYBRIDS.get(config.variant, 'vit_base_patch16_224')
  made = {
    'architecture': architecture,
    'num_classes': classes,
    'num_features': s.width,
    'model_args': arguments,
  }
  return made | {'pretrained_cfg': seen} | ({'label_names': list(labels)} if labels else {})


def crop_share(side: int, short_side: int) -> float:
  """What a crop keeps of a short side: side / share, rounded down as timm does, is that short side again."""
  share = side / short_side
  return share if math.floor(side / share) == short_side else math.nextafter(share, 0)


def merge(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split`."""
  out = dict(arrays)
  for name in arrays:
    for fused, pieces in FUSED.items():
      before, found, part = name.partition(pieces[0] + '.')
      if found and (not before or before.endswith('.')):
        out[f'{before}{fused}.{part}'] = np.concatenate(
          [out.pop(f'{before}{piece}.{part}') for piece in pieces]
        )
  return out
