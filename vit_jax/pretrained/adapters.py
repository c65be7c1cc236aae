"""A file with the adapters of a run alone: what its training changed in another model.

A .safetensors file has the arrays A and B of each adapted kernel and the parameters that were
trained themselves, such as the head, by their paths. Its metadata states the base model, a checksum
of the base's arrays, and what else a model needs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.checkpoint.run_directory import (
  read_run_config,
  read_run_labels,
  read_run_preprocessing,
)
from vit_jax.config import LoraConfig, ModelConfig
from vit_jax.data.preprocessing import preprocessing_from_dict
from vit_jax.errors import UserError, mask_credentials
from vit_jax.models.families import build_model
from vit_jax.models.lora import LoraModel, frozen_paths, merge_adapters
from vit_jax.pretrained.adapt import HEAD_PREFIXES, adapt_params
from vit_jax.pretrained.arrays import PATCH_KERNEL, POSITION_EMBEDDING, head_classes, open_arrays
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.settings.fields import config_from_dict
from vit_jax.step import abstract_params

FORMAT = 'vit_jax adapters 1'
FACTS = ('base', 'base_checksum', 'positions', 'size', 'labels', 'loss', 'step')
# Arrays of the base that are resampled to the size of the run. Other versions of NumPy may round
# them in another way, so the checksum leaves them out.
RESAMPLED = (POSITION_EMBEDDING, PATCH_KERNEL)


def write_adapters(run: Path, to: Path) -> str:
  """Write the adapters of a run, and return a line that describes the file.

  Raises UserError if `run` is not a run with adapters, or if the file cannot be written.
  """
  if not (run / 'config.json').is_file():
    raise UserError(f'--adapters: {run} is not a run directory')
  config = read_run_config(run)
  if not config.lora.rank:
    raise UserError(
      f'--adapters: {run} was trained without adapters (config.lora.rank=0): export the model'
    )
  params, step = load_newest_params(run)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  frozen = base_paths(params, config.lora)
  facts = {
    'base': mask_credentials(config.init),
    'base_checksum': checksum({path: flat[path] for path in frozen}),
    'positions': config.init_positions,
    'lora': dataclasses.asdict(config.lora),
    'model': dataclasses.asdict(config.model),
    'preprocessing': read_run_preprocessing(run).to_dict(),
    'size': config.data.size,
    'labels': read_run_labels(run),
    'loss': config.loss,
    'step': step,
  }
  arrays = {path: np.ascontiguousarray(x) for path, x in flat.items() if path not in frozen}
  metadata = {'format': FORMAT, 'vit_jax': json.dumps(facts, ensure_ascii=False)}
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, to, metadata=metadata)
  except (OSError, SafetensorError) as error:
    raise UserError(f'cannot write {to}: {getattr(error, "strerror", None) or error}') from None
  count = sum(array.size for array in arrays.values())
  size = to.stat().st_size
  return f'{to}: {count:,} parameters of adapters for {facts["base"]}, {size / 2**20:,.2f} MiB'


def checksum(flat: dict[str, np.ndarray]) -> str:
  """Return a SHA-256 of the names, shapes and values of arrays, without those in RESAMPLED."""
  digest = hashlib.sha256()
  for path in sorted(flat.keys() - set(RESAMPLED)):
    array = np.ascontiguousarray(flat[path], np.float32)
    digest.update(f'{path} {array.shape} '.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def base_paths(params: dict, lora: LoraConfig) -> set[str]:
  """Return the paths of the arrays that a run takes from its base, and does not change."""
  return {path for path in frozen_paths(params, lora) if not path.startswith(HEAD_PREFIXES)}


def is_adapter_file(path: Path) -> bool:
  """Return whether a file was written by `write_adapters`."""
  if path.suffix != '.safetensors' or not path.is_file():
    return False
  try:
    with safe_open(path, 'numpy') as file:
      return (file.metadata() or {}).get('format') == FORMAT
  except (OSError, SafetensorError):
    return False  # `open_arrays` reports it.


def read_adapters(
  path: Path, base: str | None, load: Callable[..., PretrainedModel]
) -> tuple[dict[str, np.ndarray], dict]:
  """Return the flat tree of the base with merged adapters, and the facts of the file.

  Args:
    path: the file.
    base: where the base is now. None means where it was in training.
    load: the function that loads it.

  Raises UserError if the base is missing or another model, or if the shapes do not fit.
  """
  facts, lora, config = read_metadata(path)
  source = base or facts['base']
  try:
    loaded = load(source, size='native')
  except UserError as error:
    raise UserError(
      f'{path} has adapters for {facts["base"]}. Its base cannot be loaded: {error} '
      'Name where it is now with --base, or load(…, base=…)'
    ) from None
  arrays = open_arrays(path)
  trained = {name: arrays[name] for name in arrays}
  size = tuple(facts['size'])
  model = LoraModel(build_model(config, head_classes(trained)), lora)
  shapes = flax.traverse_util.flatten_dict(abstract_params(model, size), sep='/')
  check_shapes(path, trained, shapes, lora)
  flat = fit_base(path, loaded, model, facts)
  if checksum(flat) != facts['base_checksum']:
    raise wrong_base(path, source, facts, 'its arrays have other values')
  notes = (f'adapters of rank {lora.rank}, merged with {loaded.source}',)
  known = {name: value for name, value in facts['preprocessing'].items() if value is not None}
  return merge_adapters(flat | trained, lora), known | {
    'size': size, 'target_size': known['size'], 'stated_size': known['size'],
    'positions': facts['positions'], 'model': config, 'labels': tuple(facts['labels']),
    'loss': facts['loss'], 'step': facts['step'], 'notes': notes,
  }  # fmt: skip


def read_metadata(path: Path) -> tuple[dict, LoraConfig, ModelConfig]:
  """Return the facts of a file, and its two configs. Raises UserError if they are not valid."""
  with safe_open(path, 'numpy') as file:
    text = (file.metadata() or {}).get('vit_jax', '')
  try:
    facts = json.loads(text)
    lora = config_from_dict(facts['lora'], LoraConfig)
    model = config_from_dict(facts['model'], ModelConfig)
    steps = preprocessing_from_dict(facts['preprocessing'], str(path)).to_dict()
    return {name: facts[name] for name in FACTS} | {'preprocessing': steps}, lora, model
  except (ValueError, TypeError, KeyError, UserError) as error:
    raise UserError(f'{path}: its metadata are not those of adapters: {error!r:.200}') from None


def check_shapes(path: Path, trained: dict, shapes: dict, lora: LoraConfig):
  """Raise UserError if the arrays of the file are not those of its config."""
  expected = shapes.keys() - base_paths(flax.traverse_util.unflatten_dict(shapes, sep='/'), lora)
  for name in sorted(expected | trained.keys()):
    found = list(trained[name].shape) if name in trained else 'missing'
    wanted = list(shapes[name].shape) if name in expected else 'not expected'
    if found != wanted:
      raise UserError(f'{path}: {name} is {found}, and by its metadata it is {wanted}')


def fit_base(path: Path, loaded: PretrainedModel, model: LoraModel, facts: dict) -> dict:
  """Return the arrays of the base, flat, as training fitted them to the size of the run."""
  size = tuple(facts['size'])
  shapes = abstract_params(model.base, size)
  blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  grids = {'grid': model.shape.grid(size), 'old_grid': loaded.grid}
  try:
    fitted, _ = adapt_params(loaded.params, blank, **grids, method=facts['positions'])
  except UserError as error:
    raise wrong_base(path, loaded.source, facts, str(error)) from None
  flat = flax.traverse_util.flatten_dict(fitted, sep='/')
  return {name: flat[name] for name in base_paths(fitted, model.lora)}


def wrong_base(path: Path, source: str, facts: dict, why: str) -> UserError:
  """Return the error for a base that is not the one that the adapters were trained with."""
  return UserError(
    f'{path} has adapters for {facts["base"]}, and {source} is another model: {why}. Name the base '
    'that they were trained with by --base, or load(…, base=…)'
  )
