"""Convert Hugging Face's preprocessor_config.json to our facts and back.

`size` with a height and a width resizes to that rectangle, also before a center crop;
`shortest_edge` keeps the aspect. An old file has one number, whose meaning depends on the class of
the processor, as the values of absent fields do.
"""

import dataclasses

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained.config_fields import (
  NUMBER_TYPES,
  read_field,
  read_image_size,
  read_pixel_statistics,
)
from vit_jax.pretrained.preprocessing import (
  CLIP_STATISTICS,
  HALF_STATISTICS,
  IMAGENET_STATISTICS,
  describe_assumed_steps,
)

PREPROCESSOR_FILE = 'preprocessor_config.json'
PIXEL_STATISTICS = {'mean': 'image_mean', 'scale': 'image_std'}  # Our names -> Hugging Face's.
# Pillow's numbers of its filters.
RESAMPLE_FILTERS = {
  0: 'pil_nearest', 1: 'pil_lanczos', 2: 'pil_bilinear', 3: 'pil_bicubic', 4: 'pil_box',
  5: 'pil_hamming',
}  # fmt: skip
NEAREST_FILTERS = {'tf_bilinear': 'pil_bilinear', 'tf_area': 'pil_box'}
# Fields that turn on a step that is not supported.
UNSUPPORTED_STEPS = (
  'do_pad', 'do_flip_channel_order', 'do_thumbnail', 'do_align_long_axis', 'do_color_quantize',
  'do_image_splitting', 'rescale_offset',
)  # fmt: skip
CROP_PCT_SIDE = 384  # From this side on, ConvNeXT's processor resizes without a crop.


@dataclasses.dataclass(frozen=True)
class Processor:
  """The defaults of a class of image processors (transformers 5.24)."""

  size: dict[str, int]
  resample: int
  crop_size: int = 0  # 0 means no center crop.
  square: bool = True  # `size` as one number is a square, not the shortest edge.
  crop_pct: float = 0.0  # ConvNeXT's own way to crop.


SQUARE_224 = {'height': 224, 'width': 224}
PROCESSORS = {
  'ViT': Processor(SQUARE_224, 2),
  'DeiT': Processor({'height': 256, 'width': 256}, 3, crop_size=224),
  'Beit': Processor(SQUARE_224, 3),
  'Siglip': Processor(SQUARE_224, 3),
  'Bit': Processor({'shortest_edge': 224}, 3, crop_size=224, square=False),
  'CLIP': Processor({'shortest_edge': 224}, 3, crop_size=224, square=False),
  'ConvNext': Processor({'shortest_edge': 384}, 3, square=False, crop_pct=224 / 256),
  'DINOv3ViT': Processor(SQUARE_224, 2),
}
# Processor of files that do not name one, by the model_type in config.json.
PROCESSORS_BY_MODEL_TYPE = {
  'vit': 'ViT', 'vit_mae': 'ViT', 'vit_msn': 'ViT', 'deit': 'DeiT', 'beit': 'Beit',
  'dinov2': 'Bit', 'dinov2_with_registers': 'Bit', 'siglip': 'Siglip', 'clip': 'CLIP',
  'convnext': 'ConvNext', 'bit': 'Bit', 'clip_vision_model': 'CLIP',
  'siglip_vision_model': 'Siglip', 'dinov3_vit': 'DINOv3ViT',
}  # fmt: skip
# What models are published with, by their model_type. Other models have the last row.
PUBLISHED_STEPS = {
  'dinov2': IMAGENET_STATISTICS | {
    'crop': 'center', 'resize_size': (256, 256), 'stated_size': (224, 224),
    'interpolation': 'pil_bicubic',
  },
  'deit': IMAGENET_STATISTICS | {
    'crop': 'squash', 'resize_size': (256, 256), 'stated_size': (224, 224),
    'interpolation': 'pil_bicubic',
  },
  'vit_mae': IMAGENET_STATISTICS | {'crop': 'resize', 'interpolation': 'pil_bicubic'},
  'vit_msn': IMAGENET_STATISTICS | {'crop': 'resize', 'interpolation': 'pil_bicubic'},
  'vit': HALF_STATISTICS | {'crop': 'resize', 'interpolation': 'pil_bilinear'},
  'dinov3_vit': IMAGENET_STATISTICS | {'crop': 'resize', 'interpolation': 'pil_bilinear'},
  'siglip': HALF_STATISTICS | {'crop': 'resize', 'interpolation': 'pil_bicubic'},
  'clip': CLIP_STATISTICS | {
    'crop': 'center', 'resize_size': (224, 224), 'stated_size': (224, 224),
    'interpolation': 'pil_bicubic',
  },
}  # fmt: skip
PUBLISHED_STEPS['dinov2_with_registers'] = PUBLISHED_STEPS['dinov2']
PUBLISHED_STEPS['clip_vision_model'] = PUBLISHED_STEPS['clip']
PUBLISHED_STEPS['siglip_vision_model'] = PUBLISHED_STEPS['siglip']


def read_hf_preprocessing(preprocessor: dict | None, config: dict, *, is_dinov2: bool) -> dict:
  """Return the facts in preprocessor_config.json, or what such models are published with.

  Args:
    preprocessor: The content of the file, or None without one.
    config: The content of config.json.
    is_dinov2: The arrays are DINOv2's.

  Raises UserError for an unsupported step.
  """
  model_type = read_field(config, 'model_type', str)
  if model_type not in PUBLISHED_STEPS:
    model_type = 'dinov2' if is_dinov2 else 'vit'
  published = PUBLISHED_STEPS[model_type] | {'rounding': 'transformers', 'jpeg_dct': 'accurate'}
  if preprocessor is None:
    note = describe_assumed_steps(published, PREPROCESSOR_FILE)
    return published | {'assumed': tuple(published), 'notes': (note,)}
  for name in UNSUPPORTED_STEPS:
    if preprocessor.get(name):
      raise UserError(
        f'{PREPROCESSOR_FILE}: {name}={preprocessor[name]!r} is not supported; supported steps are '
        'do_resize, do_center_crop, do_rescale and do_normalize'
      )
  statistics = read_hf_normalization(preprocessor)
  assumed = [name for name in PIXEL_STATISTICS if name not in statistics]
  facts = {name: published[name] for name in assumed} | statistics
  facts |= {'rounding': 'transformers', 'jpeg_dct': 'accurate'}
  steps, assumed_steps = read_hf_resizing(preprocessor, find_processor(preprocessor, model_type))
  return facts | steps | {'assumed': (*assumed, *assumed_steps)}


def find_processor(preprocessor: dict, model_type: str) -> Processor:
  """Return the defaults of the class that the file names, or of the type of the model."""
  for field in ('image_processor_type', 'feature_extractor_type'):
    if name := read_field(preprocessor, field, str, PREPROCESSOR_FILE):
      family = name
      for suffix in ('Fast', 'Pil', 'ImageProcessor', 'FeatureExtractor'):
        family = family.removesuffix(suffix)
      if family not in PROCESSORS:
        known = ', '.join(f'{each}ImageProcessor' for each in PROCESSORS)
        raise UserError(f'{PREPROCESSOR_FILE}: {field} {name!r} is not supported; expected {known}')
      return PROCESSORS[family]
  return PROCESSORS[PROCESSORS_BY_MODEL_TYPE[model_type]]


def read_hf_resizing(preprocessor: dict, processor: Processor) -> tuple[dict, tuple[str, ...]]:
  """Return the facts about resizing and cropping, and the names of those that are defaults."""
  resample = read_field(preprocessor, 'resample', int, PREPROCESSOR_FILE)
  assumed = ('interpolation',) if resample is None else ()
  resample = processor.resample if resample is None else resample
  if resample not in RESAMPLE_FILTERS:
    known = ', '.join(map(str, RESAMPLE_FILTERS))
    raise UserError(f'{PREPROCESSOR_FILE}: resample {resample} is not supported; expected {known}')
  facts = {'interpolation': RESAMPLE_FILTERS[resample]}
  if not preprocessor.get('size'):
    assumed += ('crop', 'resize_size')
  height, width, edge = read_hf_size(preprocessor.get('size') or processor.size, processor)
  if edge and processor.crop_pct and _is_on(preprocessor, 'do_resize', True):
    return facts | read_convnext_crop(preprocessor, processor, edge), assumed
  crops = _is_on(preprocessor, 'do_center_crop', processor.crop_size > 0)
  crop_size = None
  if crops:
    crop = preprocessor.get('crop_size') or processor.crop_size or 224
    crop_size = read_image_size(crop, 'crop_size', PREPROCESSOR_FILE)
  if not _is_on(preprocessor, 'do_resize', True):
    target = crop_size or ((height, width) if not edge else (edge, edge))
    return facts | {'crop': 'none', 'target_size': target}, assumed
  if edge and not crop_size:
    raise UserError(
      f'{PREPROCESSOR_FILE}: size has shortest_edge={edge} without do_center_crop, so that images '
      'have several shapes; expected do_center_crop=true, or size with a height and a width'
    )
  if edge:
    crop, resize_size = 'center', (edge, edge)
  else:
    crop, resize_size = 'squash', (height, width)
  if crop == 'squash' and crop_size in (None, resize_size):
    return facts | {'crop': 'resize', 'target_size': resize_size}, assumed
  facts |= {'resize_size': resize_size, 'stated_size': crop_size}
  return facts | {'crop': crop, 'target_size': crop_size}, assumed


def read_hf_size(size, processor: Processor) -> tuple[int, int, int]:
  """Return (height, width, 0), or (0, 0, shortest edge)."""
  if isinstance(size, int) and not isinstance(size, bool) and not processor.square:
    size = {'shortest_edge': size}
  if not isinstance(size, dict) or 'shortest_edge' not in size:
    return *read_image_size(size, 'size', PREPROCESSOR_FILE), 0
  if others := sorted(name for name, value in size.items() if value and name != 'shortest_edge'):
    raise UserError(f'{PREPROCESSOR_FILE}: size.{others[0]} is not supported beside shortest_edge')
  edge = read_field(size, 'shortest_edge', int, PREPROCESSOR_FILE)
  return 0, 0, read_image_size(edge or 0, 'size.shortest_edge', PREPROCESSOR_FILE)[0]


def read_convnext_crop(preprocessor: dict, processor: Processor, edge: int) -> dict:
  """Return the facts that the processor of ConvNeXT derives from `crop_pct`."""
  crop_pct = read_field(preprocessor, 'crop_pct', NUMBER_TYPES, PREPROCESSOR_FILE)
  crop_pct = processor.crop_pct if crop_pct is None else crop_pct
  if not 0 < crop_pct <= 1:
    raise UserError(f'{PREPROCESSOR_FILE}: crop_pct is {crop_pct}: expected a number in (0, 1]')
  size = (edge, edge)
  if edge >= CROP_PCT_SIDE:
    return {'crop': 'resize', 'target_size': size}
  resized = int(edge / crop_pct)
  return {
    'crop': 'center', 'resize_size': (resized, resized), 'stated_size': size, 'target_size': size,
  }  # fmt: skip


def _is_on(preprocessor: dict, name: str, default: bool) -> bool:
  value = read_field(preprocessor, name, bool, PREPROCESSOR_FILE)
  return default if value is None else value


def read_hf_normalization(preprocessor: dict) -> dict:
  """Return the mean and scale of pixels in [0, 255] that preprocessor_config.json states."""
  factor = read_field(preprocessor, 'rescale_factor', NUMBER_TYPES, PREPROCESSOR_FILE)
  rescales = read_field(preprocessor, 'do_rescale', bool, PREPROCESSOR_FILE)
  if rescales is False or (factor is not None and abs(factor * 255 - 1) > 1e-6):
    setting = 'do_rescale=false' if factor is None else f'rescale_factor={factor}'
    raise UserError(f'{PREPROCESSOR_FILE}: {setting} is not supported; expected a factor of 1/255')
  if read_field(preprocessor, 'do_normalize', bool, PREPROCESSOR_FILE) is False:
    return {'mean': (0.0,) * 3, 'scale': (255.0,) * 3}
  statistics = {
    fact: read_pixel_statistics(preprocessor, field, PREPROCESSOR_FILE)
    for fact, field in PIXEL_STATISTICS.items()
  }
  return {fact: values for fact, values in statistics.items() if values}


def hf_preprocessor_json(config: ModelConfig, steps: Preprocessing) -> dict:
  """Return the preprocessor_config.json of a model.

  transformers has no resizing without antialiasing. Such a model gets the nearest filter. Raises
  UserError if transformers has no such crop.
  """
  (h, w), resize_size = steps.size, steps.resize_size
  if steps.crop == 'border' or (steps.crop == 'center' and len(set(resize_size)) > 1):
    raise UserError(f'transformers has no crop {steps.crop!r} with resize_size={resize_size}')
  name = NEAREST_FILTERS.get(steps.interpolation, steps.interpolation)
  content = {
    'do_resize': steps.crop != 'none',
    'resample': {filter: number for number, filter in RESAMPLE_FILTERS.items()}[name],
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': [value / 255 for value in config.mean],
    'image_std': [value / 255 for value in config.scale],
  }
  if steps.crop == 'resize':
    resize = {'image_processor_type': 'ViTImageProcessor', 'size': {'height': h, 'width': w}}
    return resize | content
  content |= {'do_center_crop': True, 'crop_size': {'height': h, 'width': w}}
  if steps.crop == 'squash':
    size = {'height': resize_size[0], 'width': resize_size[1]}
    return content | {'image_processor_type': 'DeiTImageProcessor', 'size': size}
  edge = resize_size[0] if resize_size else h
  return content | {'image_processor_type': 'BitImageProcessor', 'size': {'shortest_edge': edge}}
