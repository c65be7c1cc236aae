"""The stated steps from a decoded image to the input of a model, and their execution.

`crop` says how an image gets the size of the model:

  resize   resize the image to the size, without a crop
  center   scale the image so that it covers `resize_size`, and crop the center
  squash   resize the image to `resize_size`, and crop the center
  border   scale the image so that it fits into `resize_size`, and pad with the mean
  none     do not resize: crop the center

An image that is smaller than the crop is padded with zeros, or with the mean by `border`.

`rounding` is the library whose rounding is used for the long side and for the position of the crop.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.config import DataConfig, ModelConfig
from vit_jax.data.resize import Region, write_resized_region
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.limits import CHANNELS, CHOICES

CROPS_AFTER_RESIZE = ('center', 'squash', 'border')  # Those that have a `resize_size`.
ROUNDINGS = ('tf', 'timm', 'transformers')
MAX_SIDE = 32768
# Values of the fields that preprocessing.json lacked at first: what the code did then.
FIRST_VALUES = {
  'interpolation': 'tf_bilinear', 'rounding': 'tf', 'orient': 'ignore', 'jpeg_dct': 'fast',
}  # fmt: skip
OPTIONAL_FIELDS = ('resize_size', 'channels')  # Older files have no channels, which are then 3.
STEP_CHOICES = {
  'crop': CHOICES['data.eval_crop'],
  'interpolation': CHOICES['data.interpolation'],
  'rounding': ROUNDINGS,
  'orient': CHOICES['data.orient'],
  'jpeg_dct': CHOICES['data.jpeg_dct'],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
  """The steps. Sizes are (height, width) in pixels, mean and scale are of uint8 pixels.

  Attributes:
    size: size of the result.
    crop: how an image gets that size, as the module says.
    resize_size: size that the image covers, has or fits into before the crop, or None.
    interpolation: as in resize.py.
    rounding: library whose rounding is used.
    orient: 'exif' turns photos upright, 'ignore' does not. 'auto' does so for a user's files.
    jpeg_dct: 'fast' is TensorFlow's decoder, 'accurate' Pillow's. 'auto' is accurate for a user's
      files.
    channels: 3, or 1: color becomes grey as in Pillow's mode L (ITU-R 601), before it is resized.
    mean: mean that the model subtracts, for each channel.
    scale: standard deviation that the model divides by.
  """

  size: tuple[int, int]
  crop: str = 'resize'
  resize_size: tuple[int, int] | None = None
  interpolation: str = 'tf_bilinear'
  rounding: str = 'tf'
  orient: str = 'auto'
  jpeg_dct: str = 'auto'
  channels: int = 3
  mean: tuple[float, ...] = (127.5, 127.5, 127.5)
  scale: tuple[float, ...] = (127.5, 127.5, 127.5)

  def decoding(self, *, user_file: bool) -> dict[str, bool]:
    """Return the arguments `orient` and `fast_dct` of `decode_image`.

    `user_file` says that the image is a file of the user, not a record of a published data set.
    """
    return decoding_options(self.orient, self.jpeg_dct, user_file=user_file)

  def to_dict(self) -> dict[str, object]:
    """Return the fields as JSON has them."""
    return dataclasses.asdict(self)


def decoding_options(orient: str, jpeg_dct: str, *, user_file: bool) -> dict[str, bool]:
  """Return the arguments `orient` and `fast_dct` of `decode_image`."""
  return {
    'orient': orient == 'exif' or (orient == 'auto' and user_file),
    'fast_dct': jpeg_dct == 'fast' or (jpeg_dct == 'auto' and not user_file),
  }


def describe_sizes(data: DataConfig) -> str:
  """Return the size of training images, and that of evaluation images if it is another."""
  sizes = ['{}x{}'.format(*size) for size in (data.size, data.eval_image_size)]
  evaluated = f', evaluated at {sizes[1]}' if sizes[0] != sizes[1] else ''
  return f'{sizes[0]} pixels{evaluated}'


def eval_preprocessing(data: DataConfig, model: ModelConfig | None = None) -> Preprocessing:
  """Return the steps of the evaluation images of a run."""
  model = model or ModelConfig()
  side = data.eval_short_side
  return Preprocessing(
    size=data.eval_image_size,
    crop=data.eval_crop,
    resize_size=(side, side) if data.eval_crop in CROPS_AFTER_RESIZE else None,
    interpolation=data.interpolation,
    orient=data.orient,
    jpeg_dct=data.jpeg_dct,
    channels=model.channels,
    mean=model.mean,
    scale=model.scale,
  )


def apply_preprocessing(image: np.ndarray, steps: Preprocessing, out: np.ndarray):
  """Write the preprocessed image into `out`, uint8 or float32 [h, w, 3].

  Only the part of the resized image that the crop has is computed.

  Args:
    image: Decoded pixels, uint8 [h, w, 3].
    steps: The steps. `out` has their size.
    out: The array to write. uint8 is rounded.
  """
  size = resized_size(image.shape[:2], steps)
  position = [_crop_offset(n, m, steps.rounding) for n, m in zip(size, out.shape, strict=False)]
  starts = [max(0, at) for at in position]
  counts = [
    min(n, at + m) - start
    for n, m, at, start in zip(size, out.shape, position, starts, strict=False)
  ]
  (y, x), (h, w) = ((start - at for start, at in zip(starts, position, strict=True)), counts)
  if (h, w) != out.shape[:2]:
    out[...] = np.rint(steps.mean) if steps.crop == 'border' else 0
  region: Region = (*starts, h, w)
  write_resized_region(image, size, region, steps.interpolation, out[y : y + h, x : x + w])


def resized_size(size: tuple[int, int], steps: Preprocessing) -> tuple[int, int]:
  """Return the (height, width) that an image of `size` is resized to before the crop."""
  if steps.crop == 'none':
    return size
  target = steps.resize_size or steps.size
  if steps.crop not in ('center', 'border'):
    return target
  is_square = target[0] == target[1]
  if steps.crop == 'center' and is_square and steps.rounding != 'tf':  # As torchvision's Resize.
    short = min(size)
    return tuple(target[0] if n == short else int(target[0] * n / short) for n in size)
  factors = [target[0] / size[0], target[1] / size[1]]
  factor = max(factors) if steps.crop == 'center' else min(factors)
  low = target if steps.crop == 'center' else (1, 1)
  return tuple(max(least, round(n * factor)) for n, least in zip(size, low, strict=True))


def _crop_offset(n: int, crop: int, rounding: str) -> int:
  """Return the position of a crop in `n` pixels. It is negative if the crop is larger.

  torchvision, which timm uses, rounds to even, and pads one pixel less before than after.
  """
  if rounding != 'timm':
    return (n - crop) // 2
  return round((n - crop) / 2) if n >= crop else -((crop - n) // 2)


def preprocessing_from_dict(values: Mapping[str, object], source: str) -> Preprocessing:
  """Return the steps that `to_dict` converted, or that an older version wrote.

  Raises UserError that names `source` and the field if a value is not valid.
  """
  fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
  if 'interpolation' not in fields and 'short_side' in fields:
    fields = FIRST_VALUES | fields
    side = fields.pop('short_side')
    if fields.get('crop') == 'center':
      check_step('short_side', side, source)
      fields['resize_size'] = (side, side)
  for field in dataclasses.fields(Preprocessing):
    if field.name not in fields and field.name not in OPTIONAL_FIELDS:
      raise UserError(f'{source}: {field.name} is missing')
  for name, value in fields.items():
    check_step(name, value, source)
  if (fields.get('resize_size') is None) == (fields['crop'] in CROPS_AFTER_RESIZE):
    raise UserError(
      f'{source}: resize_size={fields.get("resize_size")} is not valid with '
      f'crop={fields["crop"]!r}; {", ".join(CROPS_AFTER_RESIZE)} have one, other crops have none'
    )
  channels = fields.get('channels', 3)
  for name in ('mean', 'scale'):
    if len(fields[name]) != channels:
      raise UserError(f'{source}: {name}={fields[name]} is not valid with channels={channels}')
  return Preprocessing(**fields)


def check_step(name: str, value, source: str):
  """Raise UserError unless `value` is valid for the field `name` of `Preprocessing`."""
  if name not in STEP_CHECKS:
    raise UserError(f'{source}: {name}={value!r} is not a step.{did_you_mean(name, STEP_CHECKS)}')
  is_valid, expected = STEP_CHECKS[name]
  if not is_valid(value):
    raise UserError(f'{source}: {name}={value!r:.80} is not supported; expected {expected}')


def _is_side(value) -> bool:
  return type(value) is int and 0 < value <= MAX_SIDE


def _is_size(value) -> bool:
  return isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value))


def _are_channels(value) -> bool:
  is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9
  return isinstance(value, tuple) and len(value) in CHANNELS and all(map(is_number, value))


def _is_choice(name: str) -> Callable[[object], bool]:
  return lambda value: isinstance(value, str) and value in STEP_CHOICES[name]


# Field -> (whether a value is valid, what is expected).
STEP_CHECKS = {
  **{name: (_is_choice(name), ', '.join(choices)) for name, choices in STEP_CHOICES.items()},
  'size': (_is_size, f'height and width from 1 to {MAX_SIDE}'),
  'resize_size': (
    lambda value: value is None or _is_size(value),
    f'height and width from 1 to {MAX_SIDE}',
  ),
  'short_side': (_is_side, f'pixels from 1 to {MAX_SIDE}'),
  'channels': (lambda value: type(value) is int and value in CHANNELS, '3 (RGB) or 1 (grey)'),
  'mean': (_are_channels, 'one or three numbers'),
  'scale': (lambda value: _are_channels(value) and min(value) > 0, 'one or three positive numbers'),
}
