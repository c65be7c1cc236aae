"""Convert our tree to timm's Vision Transformer."""

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.models.variants import ViTShape, vit_shape
from vit_jax.pretrained.arrays import POSITION_EMBEDDING, head_classes
from vit_jax.pretrained.equivalents import ATTENTION_BIASES, add_zero_biases
from vit_jax.pretrained.fused_projections import fuse_projections
from vit_jax.pretrained.timm_preprocessing import timm_preprocessing_json
from vit_jax.pretrained.timm_vit import (
  FUSED_PROJECTIONS,
  FUSED_SWIGLU,
  TIMM_GELU,
  TIMM_NORM_EPS,
  TIMM_POOL,
  TIMM_STEM_PREFIX,
  add_stem_layers,
)
from vit_jax.pretrained.torch_families import split_distilled_head

# Epsilon of the norms -> a function of timm that builds models with it.
ARCHITECTURES = {TIMM_NORM_EPS: 'vit_base_patch16_224', 1e-5: 'vit_base_patch16_clip_224'}
DISTILLED_ARCHITECTURE = 'deit_base_distilled_patch16_224'
SWIGLU_ARCHITECTURE = 'vit_giant_patch14_dinov2'
TIMM_HYBRIDS = {
  'R+Ti/16': 'vit_tiny_r_s16_p8_224',
  'R26+S/32': 'vit_small_r26_s32_224',
  'R50+B/16': 'vit_base_r50_s16_224',
  'R50+L/32': 'vit_large_r50_s32_224',
}


def to_timm(
  flat: dict[str, np.ndarray],
  config: ModelConfig,
  preprocessing: Preprocessing,
  labels: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], dict]:
  """Return arrays and config.json for `timm.create_model('local-dir:…')`.

  Raises UserError if timm's Vision Transformer has no equivalent.
  """
  c = config
  numbers = {'width': c.width, 'depth': c.depth, 'mlp': c.mlp, 'heads': c.heads}
  s = vit_shape(c.variant, **numbers, swiglu=c.swiglu)
  check_supported(c, s)
  if config.registers and POSITION_EMBEDDING in flat:  # In timm, registers have positions too.
    table, d = flat[POSITION_EMBEDDING], flat[POSITION_EMBEDDING].shape[-1]
    cls = config.prefix_tokens
    rows = [table[:, :cls], np.zeros((1, config.registers, d), np.float32), table[:, cls:]]
    flat = flat | {POSITION_EMBEDDING: np.concatenate(rows, axis=1)}
  if c.qkv_bias == 'qv':  # timm has all of these biases or none.
    flat = add_zero_biases(flat, ATTENTION_BIASES)
  flat = flat if c.pre_norm else add_zero_biases(flat, ['embedding/bias'])
  stem_names = []
  if s.backbone:
    stages = enumerate(s.backbone.blocks_per_stage)
    stem_names = [
      f'{TIMM_STEM_PREFIX}stages.{i}.blocks.{j}.' for i, units in stages for j in range(units)
    ] or [f'{TIMM_STEM_PREFIX}conv.weight']
  arrays = add_stem_layers(stem_names).to_torch_arrays(split_distilled_head(flat))
  if c.swiglu:
    arrays = {name.replace('.mlp.fc1.', '.mlp.fc1_x.'): row for name, row in arrays.items()}
  arrays = fuse_projections(arrays, FUSED_PROJECTIONS | (FUSED_SWIGLU if c.swiglu else {}))
  return arrays, timm_config_json(flat, config, s, preprocessing, labels)


def check_supported(c: ModelConfig, s: ViTShape):
  """Raise UserError with the first feature of the model that timm lacks."""
  unsupported = {
    'norms around the patches': c.patch_norm,
    'a hidden layer in the head': c.hidden_head,
    f'norm_eps={c.norm_eps}, only {" or ".join(map(str, ARCHITECTURES))}': (
      c.norm_eps not in ARCHITECTURES
    ),
    f'norm_eps={c.norm_eps} with {"SwiGLU" if c.swiglu else c.variant}': (
      c.norm_eps != TIMM_NORM_EPS and (c.swiglu or c.distillation_token or s.backbone is not None)
    ),
    'rotary positions; export with --format huggingface': c.position == 'rope',
    'learned and rotary positions': c.position == 'learned+rope',
    'RMSNorm': c.norm != 'layernorm',
    'norm inside the MLP': c.mlp_norm,
    'distillation token with registers, SwiGLU or a norm before the blocks': c.distillation_token
    and (c.registers > 0 or c.swiglu or c.pre_norm or s.backbone is not None),
    'SwiGLU and attention pooling': c.swiglu and c.pool == 'map',
    'patches with a bias and a norm before the blocks': c.pre_norm and c.patch_bias,
    f'hybrid {c.variant}, only {", ".join(TIMM_HYBRIDS)}': (
      s.backbone is not None and c.variant not in TIMM_HYBRIDS
    ),
    f'stem of {c.stem_width} channels, only 64': s.backbone is not None and c.stem_width != 64,
  }
  if problems := [feature for feature, present in unsupported.items() if present]:
    raise UserError(f"timm's Vision Transformer has no {problems[0]}")


def timm_config_json(
  flat: dict[str, np.ndarray],
  config: ModelConfig,
  s: ViTShape,
  preprocessing: Preprocessing,
  labels: tuple[str, ...],
) -> dict:
  """Return the config.json from which `create_model` builds the model and its preprocessing."""
  classes = head_classes(flat)
  arguments = {
    'img_size': list(preprocessing.size),
    'embed_dim': s.width,
    'depth': s.depth,
    'num_heads': s.heads,
    'mlp_ratio': s.mlp / s.width,
    'class_token': config.has_class_token,
    'global_pool': TIMM_POOL[config.pool],
    'fc_norm': config.fc_norm,
    'reg_tokens': config.registers,
  }
  arguments |= {'init_values': config.layer_scale} if config.layer_scale else {}
  arguments |= {'qkv_bias': False} if config.qkv_bias == 'none' else {}
  arguments |= {name: True for name in ('qk_norm', 'pre_norm') if getattr(config, name)}
  if config.swiglu:  # Its first layer computes the gate too.
    arguments |= {'mlp_ratio': 2 * s.mlp / s.width}
  else:
    arguments |= {'act_layer': {ours: name for name, ours in TIMM_GELU.items()}[config.gelu]}
  arguments |= {'in_chans': config.channels} if config.channels != 3 else {}
  if not s.backbone:
    arguments['patch_size'] = list(s.patch) if s.patch[0] != s.patch[1] else s.patch[0]
  pretrained = timm_preprocessing_json(config, preprocessing) | {
    'num_classes': classes,
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
  }
  architecture = SWIGLU_ARCHITECTURE if config.swiglu else ARCHITECTURES[config.norm_eps]
  architecture = TIMM_HYBRIDS.get(config.variant, architecture)
  architecture = DISTILLED_ARCHITECTURE if config.distillation_token else architecture
  arguments |= {'pre_norm': config.pre_norm} if config.norm_eps != TIMM_NORM_EPS else {}
  content = {
    'architecture': architecture,
    'num_classes': classes,
    'num_features': s.width,
    'model_args': arguments,
    'pretrained_cfg': pretrained,
  }
  return content | ({'label_names': list(labels)} if labels else {})
