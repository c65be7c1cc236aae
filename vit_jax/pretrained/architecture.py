"""The architecture is read from the arrays: a flat tree -> the ModelConfig, classes and grid that it is of."""

import math

import flax.linen as nn
import flax.traverse_util
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.efficientnet_variants import EFFICIENTNET_PREFIX, EFFICIENTNET_SCALES
from vit_jax.models.families import build_model
from vit_jax.models.variants import HYBRID_BACKBONES, RESNET_VARIANTS, VIT_VARIANTS, ResNetBackbone
from vit_jax.step import abstract_params

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
BLOCK_PREFIX = 'Transformer/encoderblock/'
PATCH_KERNEL = 'embedding/kernel'
EFFICIENTNET_STEM_KERNEL = 'stem_conv/kernel'  # Of an EfficientNet.
RESNET_ROOT_KERNEL, PRE_HEAD_NORM_SCALE = 'conv_root/kernel', 'norm-pre-head/scale'  # Of a ResNet.
QUERY_KERNEL = f'{BLOCK_PREFIX}MultiHeadDotProductAttention_1/query/kernel'
MLP_KERNEL = f'{BLOCK_PREFIX}MlpBlock_3/Dense_0/kernel'
# The arrays that everything is read from, with their number of axes.
REQUIRED_RANKS = {PATCH_KERNEL: 4, QUERY_KERNEL: 4, MLP_KERNEL: 3}


def infer_architecture(
  flat: dict[str, np.ndarray], *, source: str, **known
) -> tuple[ModelConfig, int]:
  """(the model's config, its classes; 0 without a head). `known` are fields that the arrays don't tell, such as gelu.

  UserError where the arrays are not those of a model that models/families.py can build.
  """
  if EFFICIENTNET_STEM_KERNEL in flat:
    return make_model_config(
      {'variant': infer_efficientnet_variant(flat, source)} | known, source
    ), head_classes(flat)
  if PATCH_KERNEL not in flat and RESNET_ROOT_KERNEL in flat:
    return infer_resnet_config(flat, source, known), head_classes(flat)
  for name, axes in REQUIRED_RANKS.items():
    if name not in flat or flat[name].ndim != axes:
      got = f'it is {list(flat[name].shape)}' if name in flat else 'it is missing'
      raise UserError(
        f'{source} is no whole Vision Transformer: of {name}, {axes} axes are expected, and {got}'
      )
  depth, width, heads, _ = flat[QUERY_KERNEL].shape
  sizes = {'width': width, 'depth': depth, 'mlp': flat[MLP_KERNEL].shape[2], 'heads': heads}
  name = next((name for name, row in VIT_VARIANTS.items() if row == tuple(sizes.values())), None)
  fields = {
    'variant': vit_variant_name(flat, name or 'B', resnet_stage_blocks(flat)),
    **({} if name else sizes),
    **({'stem_width': flat[RESNET_ROOT_KERNEL].shape[-1]} if RESNET_ROOT_KERNEL in flat else {}),
    'pool': 'token' if 'cls' in flat else 'map' if 'MAPHead_0/probe' in flat else 'gap',
    'hidden_head': 'pre_logits/kernel' in flat,
    'position': 'learned' if POSITION_EMBEDDING in flat else 'sincos2d',
    'registers': flat['registers'].shape[1] if 'registers' in flat else 0,
    'patch_norm': 'embedding/norm_before/scale' in flat,
  }
  return make_model_config(fields | known, source), head_classes(flat)


def infer_resnet_config(flat: dict[str, np.ndarray], source: str, known: dict) -> ModelConfig:
  """The config of a BiT ResNet, V2 where there is a norm before the head."""
  blocks, width = resnet_stage_blocks(flat), flat[RESNET_ROOT_KERNEL].shape[-1]
  name = next(
    (name for name, row in RESNET_VARIANTS.items() if row == blocks),
    f'R{".".join(map(str, blocks))}',
  )
  form = 'BiT-' if PRE_HEAD_NORM_SCALE in flat else ''
  factor, stem_width = (width // 64, 64) if width % 64 == 0 else (1, width)
  return make_model_config(
    {'variant': f'{form}{name}x{factor}', 'stem_width': stem_width} | known, source
  )


def infer_efficientnet_variant(flat: dict[str, np.ndarray], source: str) -> str:
  """The name of the EfficientNet that has these arrays. UserError where none has."""
  backbone = {name: array.shape for name, array in flat.items() if not name.startswith('head/')}
  for name in EFFICIENTNET_SCALES:
    model = build_model(ModelConfig(variant=EFFICIENTNET_PREFIX + name), 0)
    shapes = flax.traverse_util.flatten_dict(abstract_params(model, (64, 64)), sep='/')
    if {name: leaf.shape for name, leaf in shapes.items()} == backbone:
      return EFFICIENTNET_PREFIX + name
  raise UserError(f'{source} is none of the EfficientNets {", ".join(EFFICIENTNET_SCALES)}')


def make_model_config(fields: dict, source: str) -> ModelConfig:
  """UserError for a field that there is not."""
  try:
    return ModelConfig(**fields)
  except TypeError as error:
    raise UserError(f'{source}: {error}') from None


def head_classes(flat: dict[str, np.ndarray]) -> int:
  """Of the head; 0 where there is none."""
  return flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0


def resnet_stage_blocks(flat: dict[str, np.ndarray]) -> tuple[int, ...] | None:
  """Blocks in each stage of the ResNet; None where there is none."""
  if RESNET_ROOT_KERNEL not in flat:
    return None
  units = [tuple(name.split('/')[:2]) for name in flat if name.startswith('block')]
  stages = len({stage for stage, _ in units})
  return tuple(
    len({unit for stage, unit in units if stage == f'block{i + 1}'}) for i in range(stages)
  )


def vit_variant_name(flat: dict[str, np.ndarray], name: str, blocks: tuple[int, ...] | None) -> str:
  """'B/16', 'B/16x8' for a patch that is no square, 'R50+B/16', or 'R2.1+B/8' where the blocks of a stem have no name."""
  high, wide = flat[PATCH_KERNEL].shape[:2]
  if blocks is None:
    return f'{name}/{high}' if high == wide else f'{name}/{high}x{wide}'
  for (resnet, stride), row in HYBRID_BACKBONES.items():
    if row == (blocks, high):
      return f'{resnet}+{name}/{stride}'
  return f'R{".".join(map(str, blocks))}+{name}/{high * ResNetBackbone(blocks, 0).stride}'


def infer_position_grid(
  flat: dict[str, np.ndarray], model: nn.Module, size: tuple[int, int] | None, source: str
) -> tuple[int, int]:
  """Tokens (height, width) that the position embeddings are for: those of `size`, else a square."""
  tokens = flat[POSITION_EMBEDDING].shape[1] - (model.config.pool == 'token')
  side = math.isqrt(tokens)
  if size and math.prod(model.shape.grid(size)) == tokens:
    return model.shape.grid(size)
  if side * side == tokens:
    return side, side
  raise UserError(
    f'{source} has {tokens} position embeddings, which are no square: say size=(height, width) in pixels'
  )


def check_array_shapes(
  flat: dict[str, np.ndarray], model: nn.Module, size: tuple[int, int], source: str
):
  """UserError that lists arrays which are missing, have another shape than the model's, or that it has no place for."""
  expected = flax.traverse_util.flatten_dict(abstract_params(model, size), sep='/')
  wrong = [
    f'{name} {list(leaf.shape)} is missing' for name, leaf in expected.items() if name not in flat
  ]
  wrong += [
    f'{name} {list(array.shape)} has no place'
    for name, array in flat.items()
    if name not in expected
  ]
  wrong += [
    f'{name} is {list(flat[name].shape)}, not {list(leaf.shape)}'
    for name, leaf in expected.items()
    if name in flat and flat[name].shape != leaf.shape
  ]
  if wrong:
    more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise UserError(f'{source} is no whole {model.config.variant}: ' + '; '.join(wrong[:5]) + more)
