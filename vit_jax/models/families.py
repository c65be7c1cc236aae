"""Model families: builds a model from a variant's name, and knows the settings each family reads.

A model is a linen module with these properties:

- It maps uint8 images [b, H, W, channels] and `train` to float32 logits [b, k].
- `classes` is k.
- `shape` has `flops(size)` of an image, `width` of the features, and `grid(size)` of the tokens or
  the last feature map.
- `config` is its `ModelConfig`.
- It sows 'features' [b, d], the input of its head. Families with tokens also sow 'tokens', and most
  of them 'attention'.
"""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn

from vit_jax.config import ModelConfig
from vit_jax.config_checks import check_channels
from vit_jax.errors import UserError
from vit_jax.models.axial import build_axial_resnet, build_axial_vit
from vit_jax.models.efficientnet import EFFICIENTNET_REMAT, build_efficientnet
from vit_jax.models.resnet import RESNET_REMAT, build_resnet
from vit_jax.models.vit import build_vit
from vit_jax.settings.limits import CHOICES

COMMON_SETTINGS = ('variant', 'head_bias', 'channels', 'mean', 'scale', 'dtype', 'remat')
TRANSFORMER_SETTINGS = (
  'width', 'depth', 'mlp', 'heads', 'pool', 'hidden_head', 'class_token', 'distillation_token',
  'position', 'position_at', 'rope_theta', 'rope_grid', 'rope_register_theta', 'registers',
  'patch_norm', 'pre_norm', 'fc_norm', 'qk_norm', 'qkv_bias', 'patch_bias', 'layer_scale', 'swiglu',
  'mlp_norm', 'norm', 'attention', 'dropout', 'drop_path', 'drop_path_schedule', 'gelu', 'norm_eps',
  'unroll',
)  # fmt: skip
NOT_AXIAL_SETTINGS = (
  'class_token', 'distillation_token', 'position_at', 'rope_theta', 'rope_grid',
  'rope_register_theta', 'registers', 'attention',
)  # fmt: skip
AXIAL_VIT_SETTINGS = tuple(name for name in TRANSFORMER_SETTINGS if name not in NOT_AXIAL_SETTINGS)
HYBRID_SETTINGS = (*TRANSFORMER_SETTINGS, 'stem_width')


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
  """One model family.

  Attributes:
    variant_pattern: Regular expression that matches the full names of its variants.
    build: Makes the model from (config, classes).
    settings: Fields of config.model that it reads, besides COMMON_SETTINGS.
    remat_choices: Values of config.model.remat that it supports.
  """

  variant_pattern: str
  build: Callable[[ModelConfig, int], nn.Module]
  settings: tuple[str, ...]
  remat_choices: tuple[str, ...]


_TRANSFORMER_REMAT = CHOICES['model.remat']
_RESNET_REMAT = tuple(RESNET_REMAT)
# The first pattern that matches decides. The last one matches every name: whether the name is in
# the table of Vision Transformers is checked when the model is built.
# fmt: off
FAMILIES = {
  'BiT ResNet': Family(
    r'(BiT-)?R\d+(\.\d+)*x[1-9]\d*', build_resnet, ('stem_width',), _RESNET_REMAT
  ),
  'EfficientNet': Family(
    r'EfficientNet-.*', build_efficientnet, ('dropout', 'drop_path'), tuple(EFFICIENTNET_REMAT)
  ),
  'Axial-ViT': Family(
    r'AxialViT-[^+]*', build_axial_vit, AXIAL_VIT_SETTINGS, _TRANSFORMER_REMAT
  ),
  'Axial ResNet': Family(
    r'AxialR\d+(\.\d+)*x[1-9]\d*', build_axial_resnet, ('stem_width',), _RESNET_REMAT
  ),
  'hybrid': Family(r'.+\+.+', build_vit, HYBRID_SETTINGS, _TRANSFORMER_REMAT),
  'Vision Transformer': Family(r'.*', build_vit, TRANSFORMER_SETTINGS, _TRANSFORMER_REMAT),
}
# fmt: on


def family_name(variant: str) -> str:
  """Return the name of the family that a variant belongs to."""
  matches = (name for name, row in FAMILIES.items() if re.fullmatch(row.variant_pattern, variant))
  return next(matches)


def with_article(name: str) -> str:
  """Return a family's name with its article: 'a hybrid', 'an EfficientNet'."""
  return f'{"an" if name[0] in "AE" else "a"} {name}'


def build_model(config: ModelConfig, classes: int) -> nn.Module:
  """Build the model that `config` describes; 0 classes means no head.

  Raises UserError if the variant is unknown, its numbers do not fit together, or a setting differs
  from its default although the family does not read it.
  """
  name = family_name(config.variant)
  family, default = FAMILIES[name], ModelConfig()
  subject = f'{config.variant} is {with_article(name)}'
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    read = field.name in (*COMMON_SETTINGS, *family.settings)
    if not read and value != getattr(default, field.name):
      raise UserError(f'config.model.{field.name}={value!r}: {subject}, which has no such setting')
  if config.remat not in family.remat_choices:
    raise UserError(
      f'config.model.remat={config.remat!r}: {subject}, which supports only '
      f'{", ".join(family.remat_choices)}'
    )
  check_channels(config)
  return family.build(config, classes)
