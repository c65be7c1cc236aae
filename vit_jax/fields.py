"""The types of settings, and what is of them: a config file can hold anything, and nothing wrong goes further."""

import dataclasses
import typing


def flat_types(cls, prefix: str = '') -> dict[str, type]:
  """{'data.batch': int, …}: the type of every setting, by the same names."""
  out = {}
  for f in dataclasses.fields(cls):
    out |= flat_types(f.type, f'{prefix}{f.name}.') if dataclasses.is_dataclass(f.type) else {prefix + f.name: f.type}
  return out


def is_of(kind: type, value) -> bool:
  """A whole number is a number, and True is none."""
  if parts := typing.get_args(kind):
    parts = parts[:1] * len(value) if parts[-1] is Ellipsis and isinstance(value, tuple) else parts
    return isinstance(value, tuple) and len(value) == len(parts) and all(map(is_of, parts, value))
  return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def in_words(kind: type) -> str:
  """A type as a person says it."""
  parts = typing.get_args(kind)
  if parts and parts[-1] is Ellipsis:
    return 'texts in parentheses, any number of them'
  if parts:
    return f'{len(parts)} {"whole numbers" if parts[0] is int else "numbers"}'
  return {int: 'a whole number', float: 'a number', str: 'text', bool: 'True or False'}[kind]
