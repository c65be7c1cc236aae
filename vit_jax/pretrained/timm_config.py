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
TIMM_VITS = re.compile(r'(vit|deit3?|flexivit)_.*|test_vit\d?')
# Those of them whose heads are neither our table's nor 64 wide.
TIMM_HEADS = {'test_vit': 2, 'test_vit3': 3, 'vit_base_patch16_gap_224': 16}
# Arguments that do not change the outputs of a trained model.
NEUTRAL_ARGUMENTS = (
  'num_classes', 'in_chans', 'img_size', 'drop_rate', 'drop_path_rate', 'pos_drop_rate',
  'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'weight_init', 'fix_init', 'bn_momentum',
  'dynamic_img_size', 'dynamic_img_pad', 'strict_img_size',
)  # fmt: skip
# Arguments of a Vision Transformer that its arrays show, or that the reader compares with them.
VIT_ARGUMENTS = (
  'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'qkv_bias', 'proj_bias', 'qk_norm',
  'scale_attn_norm', 'scale_mlp_norm', 'init_values', 'class_token', 'pos_embed', 'no_embed_class',
  'reg_tokens', 'pre_norm', 'final_norm', 'fc_norm', 'global_pool', 'pool_include_prefix',
  'act_layer',
)  # fmt: skip


def read_architecture(config: dict) -> str:
  """Return the name of a model in timm's config.json without its tag, or '' if there is none."""
  return (read_field(config, 'architecture', str) or '').partition('.')[0]


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
      'Transformers of timm are vit_*, deit_*, deit3_* and flexivit_*'
    )
  check_arguments(arguments, VIT_ARGUMENTS, source)
