"""Recognize timm's models by config.json, since equal arrays can belong to different functions.

`architecture` names the function that builds a model, and `model_args` are arguments that replace
its own. Names and arguments that are not known to keep the function of our model are errors.
"""

import re
from collections.abc import Collection

from vit_jax.errors import UserError
from vit_jax.pretrained.config_fields import read_field

# Names of Vision Transformers whose function their arrays, activation and pooling determine
# (timm 1.0.31, models/vision_transformer.py, vision_transformer_hybrid.py and deit.py).
TIMM_VITS = re.compile(r'(vit|deit3?|flexivit|beit|beitv2|eva|eva02)_.*|test_vit\d?')
# Vision Transformers whose function differs from ours, although their arrays may not.
OTHER_BLOCKS = {
  r'vit_.*_rpn_.*': 'a norm after each branch (ResPostBlock)',
  r'eva02_enormous_.*': 'norms after the branches (EvaBlockPostNorm)',
  r'eva02_.*_clip_.*': 'a norm inside the attention',
  r'vit_.*_(18x2|xp|dwee|pwee|dpwee|dlittle)_.*': 'other blocks (parallel or differential)',
}
# Models of timm's class Eva. Those of EVA-02 have positions that are learned and rotary, counted
# as in images of 224 pixels.
EVA_MODELS = re.compile(r'eva(02)?_\w+')
EVA02_MODELS = re.compile(r'eva02_\w+_patch14_\d+')
EVA02_GRID, EVA02_THETA = 16, 10_000.0
DINOV3_MODELS = re.compile(r'vit_\w+_dinov3(_qkvb)?')
# Those of them whose heads are neither our table's nor 64 wide.
TIMM_HEADS = {
  'test_vit': 2,
  'test_vit3': 3,
  'vit_base_patch16_gap_224': 16,
  'vit_7b_patch16_dinov3': 32,
}
# Arguments that do not change the outputs of a trained model.
NEUTRAL_ARGUMENTS = (
  'num_classes', 'in_chans', 'img_size', 'drop_rate', 'drop_path_rate', 'pos_drop_rate',
  'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'weight_init', 'fix_init', 'bn_momentum',
  'dynamic_img_size', 'dynamic_img_pad', 'strict_img_size', 'head_init_scale',
)  # fmt: skip
# Arguments of a Vision Transformer that its arrays show, or that the reader compares with them.
VIT_ARGUMENTS = (
  'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'qkv_bias', 'proj_bias', 'qk_norm',
  'scale_attn_norm', 'scale_mlp_norm', 'init_values', 'class_token', 'pos_embed', 'no_embed_class',
  'reg_tokens', 'pre_norm', 'final_norm', 'fc_norm', 'global_pool', 'pool_include_prefix',
  'act_layer', 'num_reg_tokens', 'use_abs_pos_emb', 'use_rel_pos_bias', 'use_shared_rel_pos_bias',
  'use_fc_norm', 'swiglu_mlp', 'scale_mlp', 'qkv_fused', 'ref_feat_shape',
)  # fmt: skip


def read_architecture(config: dict) -> str:
  """Return the name of a model in timm's config.json without its tag, or '' if there is none."""
  return (read_field(config, 'architecture', str) or '').partition('.')[0]


def is_dinov3(architecture: str) -> bool:
  """Return whether timm's function of this name builds a DINOv3."""
  return bool(DINOV3_MODELS.fullmatch(architecture))


def check_arguments(arguments: dict, known: Collection[str], source: str):
  """Raise UserError for an argument that may change the function of a model."""
  for name, value in arguments.items():
    if name not in NEUTRAL_ARGUMENTS and name not in known and value is not None:
      raise UserError(f'{source}: config.json has {name}={value!r}, which is not supported')


def check_vit_config(config: dict, arguments: dict, source: str):
  """Raise UserError if config.json names another model than a supported Vision Transformer."""
  name = read_architecture(config)
  if name and not TIMM_VITS.fullmatch(name):
    raise UserError(
      f'{source}: config.json has architecture={name!r}, which is not supported; supported Vision '
      'Transformers of timm are vit_*, deit_*, deit3_*, flexivit_*, beit_*, beitv2_*, eva_* and '
      'eva02_*'
    )
  for pattern, difference in OTHER_BLOCKS.items():
    if re.fullmatch(pattern, name):
      raise UserError(f'{source}: architecture={name!r} has {difference}, which is not supported')
  check_arguments(arguments, VIT_ARGUMENTS, source)
