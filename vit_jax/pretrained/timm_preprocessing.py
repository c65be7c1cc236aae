"""Convert the preprocessing in timm's config.json to our facts and back.

timm's crop modes: 'center' scales the image so that it covers the size divided by `crop_pct`, and
crops the center, also if `crop_pct` is 1. 'squash' resizes to that size without keeping the aspect.
'border' fits the image in and pads. Images of Pillow are resized with Pillow's filters.
"""

import math

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained.config_fields import (
  NUMBER_TYPES,
  read_field,
  read_image_size,
  read_pixel_statistics,
)
from vit_jax.pretrained.preprocessing import HALF_STATISTICS, IMAGENET_STATISTICS

TIMM_CROP_MODES = ('center', 'squash', 'border')
TIMM_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming')
# Our interpolations that timm lacks -> its nearest one.
NEAREST_INTERPOLATIONS = {'tf_bilinear': 'bilinear', 'tf_area': 'box'}
# Values of a family, for files that do not state them.
# timm's PretrainedCfg has these where a config.json leaves a field out (timm 1.0.31).
TIMM_DEFAULTS = {
  **IMAGENET_STATISTICS, 'crop_pct': 0.875, 'crop_mode': 'center', 'interpolation': 'bicubic',
}  # fmt: skip
AUGREG_DEFAULTS = TIMM_DEFAULTS | HALF_STATISTICS | {'crop_pct': 0.9}
DEIT_DEFAULTS = TIMM_DEFAULTS | {'crop_pct': 0.9}
DINOV2_DEFAULTS = TIMM_DEFAULTS | {'crop_pct': 1.0}
MIN_CROP_PCT = 1e-3
DEFAULT_INPUT_SIZE = (224, 224)


def timm_defaults(config: dict | None, *, layer_scale: bool) -> dict:
  """Return what a Vision Transformer has where its config.json, or None, states nothing.

  Files with layer scales are DINOv2's or DeiT III's, which agree.
  """
  if config and (config.get('pretrained_cfg') or 'crop_pct' in config):
    return TIMM_DEFAULTS
  if layer_scale:
    return DINOV2_DEFAULTS
  is_deit = str((config or {}).get('architecture', '')).startswith('deit')
  return DEIT_DEFAULTS if is_deit else AUGREG_DEFAULTS


def read_timm_preprocessing(config: dict, arguments: dict, defaults: dict) -> dict:
  """Return the facts about images and labels in timm's config.json.

  `arguments` is its field model_args. `defaults` are values of fields that it does not have; the
  facts list them as assumed. Raises UserError for an unsupported step.
  """
  # Older files have all fields at one level.
  pretrained = read_field(config, 'pretrained_cfg', dict) or config
  stated = {
    'mean': read_pixel_statistics(pretrained, 'mean'),
    'scale': read_pixel_statistics(pretrained, 'std'),
    'crop_pct': read_field(pretrained, 'crop_pct', NUMBER_TYPES),
    'crop_mode': read_field(pretrained, 'crop_mode', str),
    'interpolation': read_field(pretrained, 'interpolation', str),
  }
  stated = {name: value for name, value in stated.items() if value not in (None, '')}
  values = defaults | stated
  input_size = (read_field(pretrained, 'input_size', list) or [])[1:]  # Without channels.
  size = read_image_size(arguments.get('img_size') or input_size or None, 'img_size or input_size')
  assumed = [name for name in ('mean', 'scale', 'interpolation') if name not in stated]
  assumed += ['crop', 'resize_size'] if 'crop_pct' not in stated else []
  facts = {
    'mean': values['mean'],
    'scale': values['scale'],
    **crop_facts(values, size or DEFAULT_INPUT_SIZE),
    'rounding': 'timm',
    'jpeg_dct': 'accurate',
    'assumed': tuple(assumed),
  }
  facts |= {'size': size} if size else {}
  labels = read_field(config, 'label_names', list) or read_field(pretrained, 'label_names', list)
  return facts | ({'labels': tuple(map(str, labels))} if labels else {})


def crop_facts(values: dict, size: tuple[int, int]) -> dict:
  """Return the facts about resizing and cropping that timm's fields mean for images of `size`."""
  crop_pct, mode, interpolation = (
    values[name] for name in ('crop_pct', 'crop_mode', 'interpolation')
  )
  if crop_pct < MIN_CROP_PCT:  # Below, the resized image has too many pixels for any size.
    raise UserError(f'config.json: crop_pct is {crop_pct}: expected at least {MIN_CROP_PCT}')
  for name, value, known in (
    ('crop_mode', mode, TIMM_CROP_MODES),
    ('interpolation', interpolation, TIMM_INTERPOLATIONS),
  ):
    if value not in known:
      raise UserError(
        f'config.json: {name} {value!r} is not supported; expected {", ".join(known)}'
      )
  facts = {'crop': mode, 'interpolation': f'pil_{interpolation}'}
  resize_size = tuple(math.floor(side / crop_pct) for side in size)
  if mode == 'squash' and resize_size == size:
    return facts | {'crop': 'resize'}
  return facts | {'resize_size': resize_size, 'stated_size': size}


def timm_preprocessing_json(config: ModelConfig, steps: Preprocessing) -> dict:
  """Return the fields of timm's pretrained_cfg about images.

  timm has no resizing without antialiasing, and the same `crop_pct` for both sides. Where the
  model differs, the result is the nearest that timm has. Raises UserError if there is none.
  """
  if steps.crop == 'none':
    raise UserError("timm always resizes images, and this model's crop is 'none'")
  name = NEAREST_INTERPOLATIONS.get(steps.interpolation, steps.interpolation.removeprefix('pil_'))
  return {
    'input_size': [steps.channels, *steps.size],
    'interpolation': name,
    'crop_pct': timm_crop_pct(max(steps.size), max(steps.resize_size or steps.size)),
    'crop_mode': 'squash' if steps.crop == 'resize' else steps.crop,
    'mean': [value / 255 for value in config.mean],
    'std': [value / 255 for value in config.scale],
  }


def timm_crop_pct(side: int, resized: int) -> float:
  """Return the crop_pct for which timm's floor(side / crop_pct) is exactly `resized`."""
  crop_pct = side / resized
  exact = math.floor(side / crop_pct) == resized
  return crop_pct if exact else math.nextafter(crop_pct, 0)
