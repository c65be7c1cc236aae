"""From a variant's name to a model: the families there are, and which of config.model's settings each of them reads.

A model is a linen module. It takes uint8 images [b, H, W, 3] and `train`, and gives float32 logits [b, k]; its `classes` are k;
its `shape` knows the `flops` of an image, the `width` of the features, and the `grid` of what it sees of an image; and
it sows 'features' [b, d], what its head reads. 'tokens' and 'attention' have only those that have tokens.
"""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn

from vit_jax.config import ModelConfig
from vit_jax.config_checks import CHOICES
from vit_jax.errors import UserError
from vit_jax.models.axial import build_axial_resnet, build_axial_vit
from vit_jax.models.efficientnet import build_efficientnet
from vit_jax.models.resnet import RESNET_REMAT, build_resnet
from vit_jax.models.vit import build_vit

COMMON_SETTINGS = ('variant', 'head_bias', 'mean', 'scale', 'dtype', 'remat')
TRANSFORMER_SETTINGS = (
  *(
    'width',
    'depth',
    'mlp',
    'heads',
    'pool',
    'hidden_head',
    'position',
    'position_at',
    'registers',
    'patch_norm',
    'attention',
  ),
  *('dropout', 'drop_path', 'gelu', 'norm_eps', 'unroll'),
)
AXIAL_VIT_SETTINGS = tuple(
  field for field in TRANSFORMER_SETTINGS if field not in ('position_at', 'registers', 'attention')
)


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
  """The pattern of its variants' whole names, what builds one, and the settings it reads beside those that everybody does."""

  variants: str
  build: Callable[[ModelConfig, int], nn.Module]
  reads: tuple[str, ...]
  remat: tuple[str, ...]


# The first that matches is meant. What no other is called is a Vision Transformer, whose table knows the names.
FAMILIES = {
  'BiT ResNet': Family(
    r'(BiT-)?R\d+(\.\d+)*x[1-9]\d*', build_resnet, ('stem_width',), tuple(RESNET_REMAT)
  ),
  'EfficientNet': Family(
    r'EfficientNet-.*', build_efficientnet, ('dropout', 'drop_path'), tuple(RESNET_REMAT)
  ),
  'Axial-ViT': Family(
    r'AxialViT-[^+]*', build_axial_vit, AXIAL_VIT_SETTINGS, CHOICES['model.remat']
  ),
  'Axial ResNet': Family(
    r'AxialR\d+(\.\d+)*x[1-9]\d*', build_axial_resnet, ('stem_width',), tuple(RESNET_REMAT)
  ),
  'hybrid': Family(
    r'.+\+.+', build_vit, (*TRANSFORMER_SETTINGS, 'stem_width'), CHOICES['model.remat']
  ),
  'Vision Transformer': Family(r'.*', build_vit, TRANSFORMER_SETTINGS, CHOICES['model.remat']),
}


def family_name(variant: str) -> str:
  """The name of the variant's family."""
  return next(name for name, row in FAMILIES.items() if re.fullmatch(row.variants, variant))


def with_article(name: str) -> str:
  """'a hybrid', 'an EfficientNet'."""
  return f'{"an" if name[0] in "AE" else "a"} {name}'


def build_model(config: ModelConfig, classes: int) -> nn.Module:
  """The model that `config` describes, with a head for `classes` (0: none).

  UserError for a shape that does not work out, and for a setting that differs from its default and that the family ignores.
  """
  name = family_name(config.variant)
  row, default = FAMILIES[name], ModelConfig()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in (*COMMON_SETTINGS, *row.reads) and value != getattr(default, field.name):
      raise UserError(
        f'config.model.{field.name}={value!r}: {config.variant} is {with_article(name)}, which has no such setting'
      )
  if config.remat not in row.remat:
    known = ', '.join(row.remat)
    raise UserError(
      f'config.model.remat={config.remat!r}: {config.variant} is {with_article(name)}, which knows {known}'
    )
  return row.build(config, classes)
