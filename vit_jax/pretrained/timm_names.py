"""timm's names (`vit_*`, `deit_*`, DINO, DINOv2, SigLIP; hybrids too) to our tree and back."""

import math
import re

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import shape
from vit_jax.pretrained.arrays import Arrays, Header
from vit_jax.pretrained.torch_names import (
  ATTENTION,
  POSITION,
  Layout,
  count,
  heads_of,
  place_positions,
  shares,
  width_of,
)

KEY = 'patch_embed.proj.weight'
MAP = 'MAPHead_0/MultiHeadDotProductAttention_0'
STEM = 'patch_embed.backbone.'

TIMM = Layout(
  tables={'cls_token': 'cls', 'pos_embed': POSITION, 'reg_token': 'registers', 'attn_pool.latent': 'MAPHead_0/probe'},
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
  'dist_token': 'a distilled DeiT, which has two heads',
  'fc_norm.weight': 'a model whose last norm comes after pooling',
  'norm_pre.weight': 'a model with a norm before the blocks, as CLIP has',
}
# These are defined with the tanh form (timm 1.0.31, models/vision_transformer.py); all others with erf.
TANH = re.compile(r'vit_(base_patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512|(so400m|giantopt)_patch16_siglip)')
HYBRIDS = {
  'R+Ti/16': 'vit_tiny_r_s16_p8_224',
  'R26+S/32': 'vit_small_r26_s32_224',
  'R50+B/16': 'vit_base_r50_s16_224',
  'R50+L/32': 'vit_large_r50_s32_224',
}


def is_timm(arrays: Arrays) -> bool:
  """Whether the names are timm's."""
  return KEY in arrays


def read_timm(arrays: Arrays, config: dict | None, *, heads: int) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known besides) of timm's arrays and its config.json. UserError for a model that we are not."""
  for name, other in OTHERS.items():
    if name in arrays:
      raise UserError(f'{arrays.source} holds {name}: it is {other}, which is not among the models here')
  config = config or {}
  arguments = config.get('model_args') or {}
  width, depth = width_of(arrays, KEY), count(arrays, 'blocks.')
  heads = heads or arguments.get('num_heads') or heads_of(width, depth, arrays.source)
  kept = {name: arrays.header(name) for name in arrays if name != 'mask_token'}
  layout = with_stem(arrays)
  flat = place_positions(layout.read(Arrays(arrays.source, split(kept)), heads))
  notes = ('mask_token, which only pre-training uses, is left out',) if 'mask_token' in arrays else ()
  return flat, facts_of(config, arguments) | {'notes': notes}


def split(headers: dict[str, Header]) -> dict[str, Header]:
  """The fused projections one by one."""
  out = {}
  for name, header in headers.items():
    module, _, part = name.rpartition('.')
    fused = next((fused for fused in FUSED if module == fused or module.endswith('.' + fused)), None)
    if fused is None:
      out[name] = header
      continue
    pieces, rows = FUSED[fused], header.shape[0] // len(FUSED[fused])
    for i, piece in enumerate(pieces):
      read = lambda header=header, i=i, rows=rows: header.read()[i * rows : (i + 1) * rows]
      out[f'{module.removesuffix(fused)}{piece}.{part}'] = Header((rows, *header.shape[1:]), header.dtype, read)
  return out


def with_stem(arrays) -> Layout:
  """The layout with the units of a hybrid's stem, as many as there are. A stem without stages has shorter names."""
  units = {}
  for name in arrays:
    if match := re.match(rf'{re.escape(STEM)}stages\.(\d+)\.blocks\.(\d+)\.', name):
      ours = f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}'
      units |= {match[0] + theirs: (f'{ours}/{mine}', kind) for mine, (theirs, kind) in UNIT.items()}
  top = TIMM.top | units
  if f'{STEM}conv.weight' in arrays:
    top = {name.replace(f'{STEM}stem.', STEM): place for name, place in top.items()}
  return Layout(TIMM.tables, top, TIMM.block, TIMM.layers, TIMM.scales)


def facts_of(config: dict, arguments: dict) -> dict:
  """What timm's config.json says that arrays don't."""
  tanh = arguments.get('act_layer') == 'gelu_tanh' or TANH.match(config.get('architecture', ''))
  if arguments.get('act_layer', 'gelu') not in ('gelu', 'gelu_tanh'):
    raise UserError(f'the activation {arguments["act_layer"]!r} is not among those here: gelu, gelu_tanh')
  seen = config.get('pretrained_cfg') or {}
  facts = {'gelu': 'tanh' if tanh else 'erf', 'norm_eps': 1e-6}
  facts['assumed'] = () if config else tuple(facts)
  facts |= {ours: shares(seen[theirs]) for ours, theirs in (('mean', 'mean'), ('scale', 'std')) if theirs in seen}
  size = seen.get('input_size', ())[1:]
  if size:
    cropped = seen.get('crop_pct', 1) < 1
    facts |= {'size': tuple(size), 'crop': 'center' if cropped else 'resize'}
    facts |= {'short_side': math.floor(max(size) / seen['crop_pct'])} if cropped else {}
  labels = config.get('label_names') or seen.get('label_names')
  return facts | ({'labels': tuple(map(str, labels))} if labels else {})


def to_timm(
  flat: dict[str, np.ndarray], config: ModelConfig, preprocessing: dict, labels: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict]:
  """(arrays, config.json) for `timm.create_model('local-dir:…')`. UserError for what timm's Vision Transformer cannot be."""
  if config.patch_norm or config.hidden_head:
    what = 'norms around its patches' if config.patch_norm else 'a hidden layer in its head'
    raise UserError(f"timm's Vision Transformer has no {what}")
  s = shape(config.variant, width=config.width, depth=config.depth, mlp=config.mlp, heads=config.heads)
  if s.stem and config.variant not in HYBRIDS:
    raise UserError(f'timm has the hybrids {", ".join(HYBRIDS)}, and no {config.variant}')
  if config.registers and POSITION in flat:  # There, registers have positions too.
    table, d = flat[POSITION], flat[POSITION].shape[-1]
    first = int(config.pool == 'token')
    rows = [table[:, :first], np.zeros((1, config.registers, d), np.float32), table[:, first:]]
    flat = flat | {POSITION: np.concatenate(rows, axis=1)}
  stages = [f'{STEM}stages.{i}.blocks.{j}.' for i, n in enumerate(s.stem.blocks) for j in range(n)] if s.stem else []
  short = [f'{STEM}conv.weight'] if s.stem and not s.stem.blocks else []
  arrays = merge(with_stem([*stages, *short]).write(flat))
  size, patch = tuple(preprocessing['size']), s.patch
  classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
  arguments = {
    'img_size': list(size),
    'act_layer': {'tanh': 'gelu_tanh', 'erf': 'gelu'}[config.gelu],
    'class_token': config.pool == 'token',
    'global_pool': {'token': 'token', 'gap': 'avg', 'map': 'map'}[config.pool],
    'fc_norm': False,
    'reg_tokens': config.registers,
  }
  if not s.stem:
    arguments |= {
      'patch_size': list(patch) if patch[0] != patch[1] else patch[0],
      'embed_dim': s.width,
      'depth': s.depth,
      'num_heads': s.heads,
      'mlp_ratio': s.mlp / s.width,
    }
  seen = {
    'input_size': [3, *size],
    'interpolation': 'bilinear',
    'crop_pct': max(size) / preprocessing['short_side'] if preprocessing['crop'] == 'center' else 1.0,
    'crop_mode': 'center' if preprocessing['crop'] == 'center' else 'squash',
    'mean': [value / 255 for value in config.mean],
    'std': [value / 255 for value in config.scale],
    'num_classes': classes,
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
  }
  architecture = HYBRIDS.get(config.variant, 'vit_base_patch16_224')
  made = {'architecture': architecture, 'num_classes': classes, 'num_features': s.width, 'model_args': arguments}
  return arrays, made | {'pretrained_cfg': seen} | ({'label_names': list(labels)} if labels else {})


def merge(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split`."""
  out = dict(arrays)
  for name in arrays:
    for fused, pieces in FUSED.items():
      before, found, part = name.partition(pieces[0] + '.')
      if found and (not before or before.endswith('.')):
        out[f'{before}{fused}.{part}'] = np.concatenate([out.pop(f'{before}{piece}.{part}') for piece in pieces])
  return out
