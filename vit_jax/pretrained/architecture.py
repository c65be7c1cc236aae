"""Infer the config, classes and position grid of a model from the shapes of its arrays."""

import math

import flax.linen as nn
import flax.traverse_util
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.attention import BIASED_PROJECTIONS
from vit_jax.models.efficientnet_variants import (
  EFFICIENTNET_PREFIX,
  EFFICIENTNET_SCALES,
  TORCH_SUFFIX,
)
from vit_jax.models.families import build_model
from vit_jax.models.positions import relative_table_rows
from vit_jax.models.variants import HYBRID_BACKBONES, RESNET_VARIANTS, VIT_VARIANTS, ResNetBackbone
from vit_jax.pretrained.arrays import (
  ATTENTION_MODULE,
  BLOCK_PREFIX,
  EFFICIENTNET_STEM_KERNEL,
  PATCH_KERNEL,
  POSITION_EMBEDDING,
  PRE_HEAD_NORM_SCALE,
  RELATIVE_TABLE,
  RESNET_ROOT_KERNEL,
  head_classes,
  summarize_list,
)
from vit_jax.settings.limits import CHANNELS
from vit_jax.step import abstract_params

QUERY_KERNEL = f'{BLOCK_PREFIX}{ATTENTION_MODULE}/query/kernel'
LAYER_SCALE = 1e-5  # DINOv2's initial value of LayerScale.
MLP_KERNEL = f'{BLOCK_PREFIX}MlpBlock_3/Dense_0/kernel'
# The arrays that determine a Vision Transformer's size, with their number of axes.
REQUIRED_RANKS = {PATCH_KERNEL: 4, QUERY_KERNEL: 4, MLP_KERNEL: 3}


def infer_architecture(
  flat: dict[str, np.ndarray], *, source: str, variant: str = '', **model_fields
) -> tuple[ModelConfig, int]:
  """Return the model config and the number of classes (0 without a head) of a flat tree.

  `variant` is the variant that the file states, or '' if it states none. `model_fields` are config
  fields that arrays do not determine, such as `gelu`.

  Raises UserError if the arrays are not those of a model that models/families.py can build, or
  contradict `variant`.
  """
  classes = head_classes(flat)
  if EFFICIENTNET_STEM_KERNEL in flat:
    inferred = infer_efficientnet_variant(flat, source, model_fields.get('channels', 3))
    if variant not in ('', inferred, inferred + TORCH_SUFFIX):
      raise UserError(
        f'{source} states that it is {variant!r:.60}, but has the arrays of {inferred}'
      )
    return make_model_config({'variant': variant or inferred} | model_fields, source), classes
  if variant:
    raise UserError(f'{source} states that it is {variant!r:.60}, but it is not an EfficientNet')
  if PATCH_KERNEL not in flat and RESNET_ROOT_KERNEL in flat:
    return infer_resnet_config(flat, source, model_fields), classes
  for name, axes in REQUIRED_RANKS.items():
    if name not in flat or flat[name].ndim != axes:
      problem = f'has shape {list(flat[name].shape)}' if name in flat else 'is missing'
      raise UserError(
        f'{source} is not a complete Vision Transformer: {name} {problem}; expected {axes} axes'
      )
  depth, width, heads, _ = flat[QUERY_KERNEL].shape
  sizes = {'width': width, 'depth': depth, 'mlp': flat[MLP_KERNEL].shape[2], 'heads': heads}
  name = next((name for name, row in VIT_VARIANTS.items() if row == tuple(sizes.values())), None)
  fields = {
    'variant': vit_variant_name(flat, name or 'B', resnet_stage_blocks(flat)),
    **({} if name else sizes),
    **({'stem_width': flat[RESNET_ROOT_KERNEL].shape[-1]} if RESNET_ROOT_KERNEL in flat else {}),
    **pooling_fields(flat, model_fields.get('pool', '')),
    'hidden_head': 'pre_logits/kernel' in flat,
    'position': infer_position(flat),
    'distillation_token': 'dist' in flat,
    'registers': flat['registers'].shape[1] if 'registers' in flat else 0,
    'patch_norm': 'embedding/norm_before/scale' in flat,
    **block_fields(flat),
  }
  return make_model_config(fields | model_fields, source), classes


def infer_position(flat: dict[str, np.ndarray]) -> str:
  """Return the kind of position embeddings that the arrays imply."""
  if POSITION_EMBEDDING in flat:
    return 'learned'
  return 'relative2d' if RELATIVE_TABLE in flat else 'sincos2d'


def count_channels(flat: dict[str, np.ndarray], source: str) -> int:
  """Return the channels of the images that the first layer of a flat tree reads.

  Raises UserError unless they are RGB or grey.
  """
  roots = (EFFICIENTNET_STEM_KERNEL, RESNET_ROOT_KERNEL, PATCH_KERNEL)
  kernel = next((flat[name] for name in roots if name in flat), None)
  channels = 3 if kernel is None or kernel.ndim != 4 else kernel.shape[2]
  if channels not in CHANNELS:
    raise UserError(
      f'{source} takes images of {channels} channels; supported are 3 (RGB) and 1 (grey)'
    )
  return channels


def pooling_fields(flat: dict[str, np.ndarray], pool: str) -> dict:
  """Return the settings of the pooling, which is `pool` if the file states one."""
  has_token, fc_norm = 'cls' in flat, 'fc_norm/scale' in flat
  if not pool:
    is_token = has_token and not fc_norm
    pool = 'map' if 'MAPHead_0/probe' in flat else 'token' if is_token else 'gap'
  return {'pool': pool, 'class_token': has_token and pool == 'gap', 'fc_norm': fc_norm}


def block_fields(flat: dict[str, np.ndarray]) -> dict:
  """Return the settings of the encoder's blocks and the layers around them."""
  attention = f'{BLOCK_PREFIX}{ATTENTION_MODULE}'
  biases = tuple(name for name in ('query', 'key', 'value') if f'{attention}/{name}/bias' in flat)
  qkv_bias = next((name for name, row in BIASED_PROJECTIONS.items() if row == biases), 'qkv')
  has_scales = f'{BLOCK_PREFIX}attention_scale' in flat
  return {
    'pre_norm': 'Transformer/pre_norm/scale' in flat,
    'qk_norm': f'{attention}/query_norm/scale' in flat,
    'qkv_bias': qkv_bias,
    'patch_bias': 'embedding/bias' in flat,
    'layer_scale': LAYER_SCALE if has_scales else 0.0,
    'swiglu': f'{BLOCK_PREFIX}MlpBlock_3/Gate/kernel' in flat,
    'mlp_norm': f'{BLOCK_PREFIX}MlpBlock_3/hidden_norm/scale' in flat,
  }


def infer_resnet_config(
  flat: dict[str, np.ndarray], source: str, model_fields: dict
) -> ModelConfig:
  """Return the config of a ResNet. A norm before the head identifies BiT's ResNet-v2."""
  blocks, width = resnet_stage_blocks(flat), flat[RESNET_ROOT_KERNEL].shape[-1]
  unnamed = f'R{".".join(map(str, blocks))}'
  name = next((name for name, row in RESNET_VARIANTS.items() if row == blocks), unnamed)
  prefix = 'BiT-' if PRE_HEAD_NORM_SCALE in flat else ''
  factor, stem_width = (width // 64, 64) if width % 64 == 0 else (1, width)
  fields = {'variant': f'{prefix}{name}x{factor}', 'stem_width': stem_width}
  return make_model_config(fields | model_fields, source)


def infer_efficientnet_variant(flat: dict[str, np.ndarray], source: str, channels: int = 3) -> str:
  """Return the name of the EfficientNet whose backbone has exactly these arrays.

  Raises UserError if there is none.
  """
  backbone = {name: array.shape for name, array in flat.items() if not name.startswith('head/')}
  fields = {'channels': channels, 'mean': (127.5,) * channels, 'scale': (127.5,) * channels}
  for name in EFFICIENTNET_SCALES:
    config = ModelConfig(variant=EFFICIENTNET_PREFIX + name, **fields)
    model = build_model(config, 0)
    shapes = flax.traverse_util.flatten_dict(abstract_params(model, (64, 64)), sep='/')
    if {name: leaf.shape for name, leaf in shapes.items()} == backbone:
      return EFFICIENTNET_PREFIX + name
  raise UserError(f'{source} matches none of the EfficientNets {", ".join(EFFICIENTNET_SCALES)}')


def make_model_config(fields: dict, source: str) -> ModelConfig:
  """Build a ModelConfig. Raises UserError for a field that does not exist."""
  try:
    return ModelConfig(**fields)
  except TypeError as error:
    raise UserError(f'{source}: {error}') from None


def resnet_stage_blocks(flat: dict[str, np.ndarray]) -> tuple[int, ...] | None:
  """Return the number of blocks in each stage of the ResNet, or None without a ResNet."""
  if RESNET_ROOT_KERNEL not in flat:
    return None
  units = {tuple(name.split('/')[:2]) for name in flat if name.startswith('block')}
  stages = len({stage for stage, _ in units})
  return tuple(sum(stage == f'block{i + 1}' for stage, _ in units) for i in range(stages))


def vit_variant_name(flat: dict[str, np.ndarray], name: str, blocks: tuple[int, ...] | None) -> str:
  """Return the variant of a Vision Transformer of size `name`.

  Examples: 'B/16'; 'B/16x8' for patches that are not square; 'R50+B/16' for a hybrid; 'R2.1+B/8'
  for a hybrid whose stages (2 and 1 blocks) have no name.
  """
  p, q = flat[PATCH_KERNEL].shape[:2]
  if blocks is None:
    return f'{name}/{p}' if p == q else f'{name}/{p}x{q}'
  for (resnet, stride), row in HYBRID_BACKBONES.items():
    if row == (blocks, p):
      return f'{resnet}+{name}/{stride}'
  return f'R{".".join(map(str, blocks))}+{name}/{p * ResNetBackbone(blocks, 0).stride}'


def infer_position_grid(
  flat: dict[str, np.ndarray], model: nn.Module, size: tuple[int, int] | None, source: str
) -> tuple[int, int]:
  """Return the grid (height, width) in patches of the position embeddings.

  It is the grid for images of `size` pixels if the number of tokens matches, and a square
  otherwise.

  Raises UserError if the number of tokens fits neither.
  """
  if RELATIVE_TABLE in flat:
    rows = flat[RELATIVE_TABLE].shape[1] - 3 * model.config.has_class_token
    side = (math.isqrt(max(0, rows)) + 1) // 2
    grids = ([model.shape.grid(size)] if size else []) + [(side, side)]
    if fitting := [grid for grid in grids if side and relative_table_rows(grid) == rows]:
      return fitting[0]
    raise UserError(f'{source} has {rows} relative positions, which do not fit a square of patches')
  tokens = flat[POSITION_EMBEDDING].shape[1] - model.config.prefix_tokens
  side = math.isqrt(tokens)
  if size and math.prod(model.shape.grid(size)) == tokens:
    return model.shape.grid(size)
  if side * side == tokens:
    return side, side
  raise UserError(
    f'{source} has {tokens} position embeddings, which do not form a square: '
    'add size=(height, width) in pixels'
  )


def check_array_shapes(
  flat: dict[str, np.ndarray], model: nn.Module, size: tuple[int, int], source: str
):
  """Raise UserError with a list of arrays that are missing, unexpected, or of the wrong shape."""
  expected = flax.traverse_util.flatten_dict(abstract_params(model, size), sep='/')
  problems = [
    f'{name} {list(leaf.shape)} is missing' for name, leaf in expected.items() if name not in flat
  ]
  problems += [
    f'{name} {list(array.shape)} is unexpected'
    for name, array in flat.items()
    if name not in expected
  ]
  problems += [
    f'{name} has shape {list(flat[name].shape)}, expected {list(leaf.shape)}'
    for name, leaf in expected.items()
    if name in flat and flat[name].shape != leaf.shape
  ]
  if problems:
    variant = model.config.variant
    raise UserError(f'{source} is not a complete {variant}: {summarize_list(problems)}')
