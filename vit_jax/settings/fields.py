"""Convert a config to dicts and back, and address its settings by name."""

import dataclasses

from vit_jax.config import Config
from vit_jax.errors import UserError, did_you_mean


def config_to_dict(config) -> dict:
  """Return the config as plain nested dicts, the content of config.json."""
  return dataclasses.asdict(config)


def flatten_config(config, prefix: str = '') -> dict[str, object]:
  """Return {'data.batch': 256, …}: every setting, with the name that follows `--config.`."""
  out: dict[str, object] = {}
  for f in dataclasses.fields(config):
    name, value = prefix + f.name, getattr(config, f.name)
    is_group = dataclasses.is_dataclass(value)
    out |= flatten_config(value, f'{name}.') if is_group else {name: value}
  return out


def setting_types(cls, prefix: str = '') -> dict:
  """Return {'data.batch': int, …}: the type of every setting, named as by `flatten_config`."""
  out: dict = {}
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      out |= setting_types(f.type, f'{prefix}{f.name}.')
    else:
      out[prefix + f.name] = f.type
  return out


def with_settings(config: Config, settings: dict[str, object]) -> Config:
  """Return a copy of the config with {'model.remat': 'full', 'seed': 1, …} set."""
  for name, value in settings.items():
    group, _, field_name = name.rpartition('.')
    part = value
    if group:
      part = dataclasses.replace(getattr(config, group), **{field_name: value})
    config = dataclasses.replace(config, **{group or field_name: part})
  return config


def config_from_dict(values: dict, cls=Config):
  """Return the config of a dict as from `config_to_dict`. Raises UserError for an unknown name."""
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if not isinstance(values, dict):
    raise UserError(f'a config is a table of settings, not {values!r:.80}')
  for name in values:
    if name not in fields:
      raise UserError(f'config field {name!r} is unknown.{did_you_mean(name, fields)}')

  def restore(kind: type, value):
    if dataclasses.is_dataclass(kind):
      return config_from_dict(value, kind)
    return tuple(value) if isinstance(value, list) else value

  return cls(**{name: restore(fields[name].type, value) for name, value in values.items()})
