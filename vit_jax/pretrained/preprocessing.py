"""The preprocessing of a pre-trained model: what its files state, or what its family is known for.

Readers return facts: fields of `Preprocessing`, `stated_size`, the (height, width) of the result
that `resize_size` refers to, and `assumed`, the names of the facts that no file states.
"""

from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import CROPS_AFTER_RESIZE, Preprocessing, preprocessing_from_dict
from vit_jax.errors import UserError

# Facts that are passed on to `Preprocessing` as they are.
STEP_FACTS = ('interpolation', 'rounding', 'orient', 'jpeg_dct')
HALF_STATISTICS = {'mean': (127.5,) * 3, 'scale': (127.5,) * 3}
IMAGENET_STATISTICS = {
  'mean': (123.675, 116.28, 103.53), 'scale': (58.395, 57.12, 57.375),
}  # fmt: skip
CLIP_STATISTICS = {
  'mean': (122.770938, 116.746013, 104.093736), 'scale': (68.500533, 66.632158, 70.323163),
}  # fmt: skip
# The released code resizes to a square, without a crop.
GOOGLE_STEPS = {
  'crop': 'resize', 'interpolation': 'tf_bilinear', 'rounding': 'tf', 'jpeg_dct': 'fast',
}  # fmt: skip
# 'resize_small(256)|central_crop(224)', big_vision's evaluation on ImageNet. Its default
# interpolation is the area.
BIG_VISION_STEPS = GOOGLE_STEPS | {
  'crop': 'center',
  'interpolation': 'tf_area',
  'resize_size': (256, 256),
  'stated_size': (224, 224),
}
# Short side of an image of 224 pixels, where only the crop is known.
DEFAULT_CENTER_RATIO = 256 / 224


def merge_facts(file_facts: dict, known_facts: dict) -> dict:
  """Return the facts of a file, replaced by those that are known otherwise.

  A size that belongs to another crop is dropped.
  """
  changed = 'crop' in known_facts and known_facts['crop'] != file_facts.get('crop')
  if changed or 'resize_size' in known_facts:
    dropped = ('resize_size', 'stated_size')
    file_facts = {name: value for name, value in file_facts.items() if name not in dropped}
  assumed = set(file_facts.get('assumed', ())) - set(known_facts)
  if 'target_short_side' in known_facts:
    assumed.discard('resize_size')
  return file_facts | known_facts | {'assumed': assumed}


def fit_statistics(facts: dict, channels: int, source: str) -> tuple[dict, tuple[str, ...]]:
  """Return the facts with a mean and a scale for each of the channels, and notes.

  Three equal numbers become one for grey images. So does the average of three that are assumed.
  Raises UserError for three different numbers that a file states.
  """
  if facts.get('channels', channels) != channels:
    raise UserError(
      f'{source}: channels={facts["channels"]} is stated, but its arrays are for {channels}'
    )
  fitted, notes = {}, ()
  for name, number in (('mean', 'mean'), ('scale', 'std')):
    values = facts.get(name, (127.5,) * channels)
    if channels == 1 and len(values) == 3 and len(set(values)) > 1:
      if name not in facts['assumed']:
        raise UserError(
          f'{source} takes images of one channel, and the {number} is stated for three: give one, '
          f'{number}=NUMBER in [0, 1]'
        )
      values = (round(sum(values) / 3, 6),)
      notes += (f'one channel: assuming {number} {values[0] / 255:.4g}, the average of three',)
    fitted[name] = values[:channels] if len(values) >= channels else values * channels
  return facts | fitted | {'channels': channels}, notes


def sidecar_steps(facts: dict) -> dict:
  """Return the facts of a .json file of ours. Older ones have a short side."""
  if 'short_side' not in facts:
    return facts
  facts = dict(facts)
  side = facts.pop('short_side')
  return facts | ({'resize_size': (side, side)} if facts.get('crop') == 'center' else {})


def resolve_preprocessing(
  facts: dict,
  config: ModelConfig,
  *,
  native_size: tuple[int, int],
  size: tuple[int, int],
  source: str,
) -> Preprocessing:
  """Return the steps for images of `size`.

  Args:
    facts: The facts about the model.
    config: The config of the model, with its mean and scale.
    native_size: The image size of the model's file.
    size: The image size of the model.
    source: Names the model in error messages.

  Raises UserError if a fact is not valid.
  """
  steps = {name: facts[name] for name in STEP_FACTS if name in facts}
  steps |= {'crop': facts.get('crop', 'resize')}
  steps |= {'channels': config.channels, 'mean': config.mean, 'scale': config.scale}
  if steps['crop'] in CROPS_AFTER_RESIZE:
    steps['resize_size'] = resolve_resize_size(facts, native_size, size, source)
  return preprocessing_from_dict(Preprocessing(size=size).to_dict() | steps, source)


def resolve_resize_size(
  facts: dict, native_size: tuple[int, int], size: tuple[int, int], source: str
) -> tuple[int, int]:
  """Return the `resize_size` for images of `size`.

  Its proportion to the image size is the stated one. An override refers to `size` already.
  """
  if 'target_short_side' in facts:
    side = facts['target_short_side']
    if facts['crop'] != 'border' and side < max(size):
      raise UserError(f'{source}: short_side={side} is less than the size of the crop, {size}')
    return side, side
  if 'resize_size' not in facts:
    side = round(max(size) * DEFAULT_CENTER_RATIO)
    return (side, side) if facts['crop'] == 'center' else size
  stated = facts.get('stated_size') or native_size
  if size == stated:
    return facts['resize_size']
  scaled = zip(facts['resize_size'], size, stated, strict=True)
  return tuple(round(side * new / old) for side, new, old in scaled)


def describe_assumed_steps(facts: dict, file: str) -> str:
  """Return the note that `file` is absent, and what is assumed instead."""
  mean, scale = (
    ','.join(f'{value / 255:.4g}' for value in facts[name]) for name in ('mean', 'scale')
  )
  size = '{}x{}'.format(*facts['resize_size']) if 'resize_size' in facts else 'the size'
  steps = {
    'resize': 'resized without a crop',
    'center': f'a center crop after resizing to cover {size}',
    'squash': f'a center crop after resizing to {size}',
  }
  return (
    f'no {file}: assuming mean {mean}, std {scale} and {steps[facts["crop"]]} '
    f'({facts["interpolation"]})'
  )
