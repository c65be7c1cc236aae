"""Read typed fields of the JSON files of timm and Hugging Face."""

from vit_jax.errors import UserError

NUMBER_TYPES = (int, float)
TYPE_DESCRIPTIONS = {
  int: 'an integer',
  NUMBER_TYPES: 'a number',
  str: 'a string',
  bool: 'true or false',
  list: 'a list',
  dict: 'an object',
}


def read_field(config: dict, name: str, kind: type | tuple[type, ...], file: str = 'config.json'):
  """Return a field of a JSON object, or None if it is missing or null.

  Raises UserError if the value has another type than `kind`, a key of TYPE_DESCRIPTIONS.
  """
  value = config.get(name)
  if value is None:
    return None
  if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
    raise UserError(f'{file}: {name} is {value!r}: expected {TYPE_DESCRIPTIONS[kind]}')
  return value


def read_pixel_statistics(
  config: dict, name: str, file: str = 'config.json'
) -> tuple[float, float, float] | None:
  """Read a mean or standard deviation of pixels in [0, 1], scaled to [0, 255] and rounded.

  Returns None if the field is missing. Raises UserError unless it holds three numbers.
  """
  values = read_field(config, name, list, file)
  if values is None:
    return None
  if len(values) != 3 or not all(isinstance(value, NUMBER_TYPES) for value in values):
    raise UserError(f'{file}: {name} is {values}: expected three numbers')
  return tuple(round(255 * value, 6) for value in values)


def read_image_size(value, name: str, file: str = 'config.json') -> tuple[int, int] | None:
  """Convert one number, a list of two, or an object with both to (height, width) in pixels.

  Returns None for null. Raises UserError for any other value of the field `name`.
  """
  if value is None:
    return None
  sides = [value.get('height'), value.get('width')] if isinstance(value, dict) else value
  sides = [sides, sides] if isinstance(sides, int) else sides
  is_pair = isinstance(sides, list) and len(sides) == 2
  if not is_pair or not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f'{file}: {name} is {value!r}: expected a height and a width in pixels')
  return tuple(sides)
