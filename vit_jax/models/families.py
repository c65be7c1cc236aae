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
from vit_jax.models.axial import axial
from vit_jax.models.axial_resnet import axial_resnet
from vit_jax.models.efficientnet import efficientnet
from vit_jax.models.resnet import REMAT, resnet
from vit_jax.models.vit import vit

EVERYBODY = ('variant', 'head_bias', 'mean', 'scale', 'dtype', 'remat')
TRANSFORMER = (
  *('width', 'depth', 'mlp', 'heads', 'pool', 'hidden_head', 'position', 'position_at', 'registers', 'patch_norm', 'attention'),
  *('dropout', 'drop_path', 'gelu', 'norm_eps', 'unroll'),
)
AXIAL = tuple(field for field in TRANSFORMER if field not in ('position_at', 'registers', 'attention'))


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
  """The pattern of its variants' whole names, what builds one, and the settings it reads beside those that everybody does."""

  variants: str
  build: Callable[[ModelConfig, int], nn.Module]
  reads: tuple[str, ...]
  remat: tuple[str, ...]


# The first that matches is meant. What no other is called is a Vision Transformer, whose table knows the names.
FAMILIES = {
  'BiT ResNet': Family(r'(BiT-)?R\d+(\.\d+)*x[1-9]\d*', resnet, ('stem_width',), tuple(REMAT)),
  'EfficientNet': Family(r'EfficientNet-.*', efficientnet, ('dropout', 'drop_path'), tuple(REMAT)),
  'Axial-ViT': Family(r'AxialViT-[^+]*', axial, AXIAL, CHOICES['model.remat']),
  'Axial ResNet': Family(r'AxialR\d+(\.\d+)*x[1-9]\d*', axial_resnet, ('stem_width',), tuple(REMAT)),
  'hybrid': Family(r'.+\+.+', vit, (*TRANSFORMER, 'stem_width'), CHOICES['model.remat']),
  'Vision Transformer': Family(r'.*', vit, TRANSFORMER, CHOICES['model.remat']),
}


def family(variant: str) -> str:
  """The name of the variant's family."""
  return next(name for name, row in FAMILIES.items() if re.fullmatch(row.variants, variant))


def article(name: str) -> str:
  """'a hybrid', 'an EfficientNet'."""
  return f'{"an" if name[0] in "AE" else "a"} {name}'


def build(config: ModelConfig, classes: int) -> nn.Module:
  """The model that `config` describes, with a head for `classes` (0: none).

  UserError for a shape that does not work out, and for a setting that differs from its default and that the family ignores.
  """
  name = family(config.variant)
  row, default = FAMILIES[name], ModelConfig()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in (*EVERYBODY, *row.reads) and value != getattr(default, field.name):
      raise UserError(f'config.model.{field.name}={value!r}: {config.variant} is {article(name)}, which has no such setting')
  if config.remat not in row.remat:
    known = ', '.join(row.remat)
    raise UserError(f'config.model.remat={config.remat!r}: {config.variant} is {article(name)}, which knows {known}')
  return row.build(config, classes)
