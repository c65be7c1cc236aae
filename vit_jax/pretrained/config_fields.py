"""Read typed fields of the JSON files of timm and Hugging Face.

JSON has NaN, infinity and integers of any size, none of which describes a model.
"""

import math

from vit_jax.data.preprocessing import MAX_SIDE
from vit_jax.errors import UserError
from vit_jax.settings.limits import CHANNELS

NUMBER_TYPES = (int, float)
TYPE_DESCRIPTIONS = {
  int: 'an integer',
  NUMBER_TYPES: 'a number',
  str: 'a string',
  bool: 'true or false',
  list: 'a list',
  dict: 'an object',
}
MAX_NUMBER = 10**6  # Above every number in a config.json.
_MAX_SHOWN = 60  # Characters of a value in a message.


def read_field(config: dict, name: str, kind: type | tuple[type, ...], file: str = 'config.json'):
  """Return a field of a JSON object, or None if it is missing or null.

  Raises UserError if the value has another type than `kind`, a key of TYPE_DESCRIPTIONS, or is a
  number that is not finite or above MAX_NUMBER.
  """
  value = config.get(name)
  if value is None:
    return None
  if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
    raise UserError(f'{file}: {name} is {show_value(value)}: expected {TYPE_DESCRIPTIONS[kind]}')
  if kind in (int, NUMBER_TYPES) and not is_sane_number(value):
    raise UserError(f'{file}: {name} is {show_value(value)}: expected at most {MAX_NUMBER:,}')
  return value


def is_sane_number(value) -> bool:
  """Return whether a value is a finite number of at most MAX_NUMBER, and not a boolean."""
  is_number = isinstance(value, NUMBER_TYPES) and not isinstance(value, bool)
  return (
    is_number
    and not (isinstance(value, float) and math.isnan(value))
    and (abs(value) <= MAX_NUMBER)
  )


def show_value(value) -> str:
  """Return the start of a value's representation, for a message of one line."""
  is_long_integer = isinstance(value, int) and abs(value) > 10**_MAX_SHOWN
  text = 'a very long integer' if is_long_integer else repr(value)
  return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}…'


def read_pixel_statistics(
  config: dict, name: str, file: str = 'config.json'
) -> tuple[float, float, float] | None:
  """Read a mean or standard deviation of pixels in [0, 1], scaled to [0, 255] and rounded.

  One number, of grey images, is repeated. Returns None if the field is missing. Raises UserError
  unless it holds one or three numbers.
  """
  values = read_field(config, name, list, file)
  if values is None:
    return None
  positive = name.endswith('std')
  if (
    len(values) not in CHANNELS
    or not all(map(is_sane_number, values))
    or (positive and not all(value > 0 for value in values))
  ):
    kind = f'one or three {"positive " if positive else ""}numbers'
    raise UserError(f'{file}: {name} is {show_value(values)}: expected {kind}')
  return tuple(round(255 * value, 6) for value in values) * (3 // len(values))


def read_image_size(value, name: str, file: str = 'config.json') -> tuple[int, int] | None:
  """Convert one number, a list of two, or an object with both to (height, width) in pixels.

  Returns None for null. Raises UserError for any other value of the field `name`.
  """
  if value is None:
    return None
  sides = [value.get('height'), value.get('width')] if isinstance(value, dict) else value
  sides = [sides, sides] if isinstance(sides, int) else sides
  is_pair = isinstance(sides, list) and len(sides) == 2
  is_whole = is_pair and all(isinstance(side, int) and is_sane_number(side) for side in sides)
  if not is_whole or not all(0 < side <= MAX_SIDE for side in sides):
    raise UserError(
      f'{file}: {name} is {show_value(value)}: expected a height and a width in pixels, at most '
      f'{MAX_SIDE:,}'
    )
  return tuple(sides)
