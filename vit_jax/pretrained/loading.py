"""`load`: a catalogue name, a path or a URL -> a model. Which files there are is catalogue.py's, how they are laid out npz.py's
and torch_layout.py's, and what architecture they hold architecture.py's."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import numpy as np

from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.checkpoint.run_directory import (
  read_run_config,
  read_run_labels,
  read_run_preprocessing,
)
from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.data.imagenet import imagenet_class_names
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.families import build_model
from vit_jax.pretrained.adapt import MASKING_PREFIXES, PATCH_KERNEL, POSITION_EMBEDDING
from vit_jax.pretrained.architecture import (
  check_array_shapes,
  infer_architecture,
  infer_position_grid,
)
from vit_jax.pretrained.arrays import LazyArrays, open_arrays
from vit_jax.pretrained.catalogue import (
  ReleasedCheckpoint,
  find_checkpoint,
  find_checkpoint_of_file,
  suggest_names,
)
from vit_jax.pretrained.download import fetch
from vit_jax.pretrained.huggingface import is_huggingface, read_huggingface
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.npz import find_google_prefix, is_resnet, read_google, read_resnet
from vit_jax.pretrained.resample import RESAMPLE_METHODS, pi_resize, resample_positions
from vit_jax.pretrained.timm_efficientnet import is_efficientnet, read_efficientnet
from vit_jax.pretrained.timm_vit import is_timm, read_timm

# What may be said of a model besides where it is, as keywords of `load` and as flags.
MODEL_OVERRIDES = ('gelu', 'norm_eps', 'dtype', 'position')  # Fields of ModelConfig.
LOAD_OVERRIDES = (
  *MODEL_OVERRIDES,
  'heads',
  'mean',
  'std',
  'size',
  'patch',
  'positions',
  'crop',
  'short_side',
  'labels',
)
SIDECAR_FIELDS = (
  *MODEL_OVERRIDES,
  'loss',
  'size',
  'crop',
  'short_side',
  'mean',
  'scale',
  'labels',
)  # What `export` writes beside an .npz.
DEFAULT_LABEL_SETS = {
  1000: 'imagenet1k',
  21843: 'imagenet21k',
}  # What so many classes are taken for, where nobody says.


def load(source: str, **overrides) -> PretrainedModel:
  """The model in `source`, with its architecture read from its arrays.

  `source`: a name of the catalogue ('augreg/B_16', 'imagenet21k+imagenet2012/ViT-B_16-224'), an .npz or .safetensors
  file, a Hugging Face or timm directory, a run directory of ours (of a pattern such as 'runs/quickstart-*' the newest that
  matches), or a URL of a file (https://, gs://, …), which is kept in the cache.

  `overrides`: what arrays cannot tell, where the file does not say it or says it wrong. gelu ('tanh', 'erf'), norm_eps,
  heads (of files with two-dimensional attention kernels), mean and std (of a pixel in [0, 1], three numbers), crop
  ('resize', 'center'), short_side, labels, dtype of the computation; size (pixels: one number or height, width), to which
  position embeddings are resampled, by positions ('corner', 'half_pixel', 'bicubic'); and patch (pixels), to which patch
  kernels are resized as FlexiViT does.

  UserError where there is no such thing, it cannot be read, or it is not wholly such a model.
  """
  for name in overrides:
    if name not in LOAD_OVERRIDES:
      raise UserError(
        f'load({source!r}): there is no setting {name!r}.{did_you_mean(name, LOAD_OVERRIDES)}'
      )
  said = {name: value for name, value in overrides.items() if value is not None}
  path, row = resolve_source(source)
  if (path / 'config.json').is_file() and (path / 'preprocessing.json').is_file():
    flat, known = read_run_directory(path)
  else:
    flat, known = read_model_file(path, heads=said.get('heads', 0))
    row = row or find_checkpoint_of_file(path)
  told = read_sidecar(path) | catalogue_facts(row) | parse_overrides(said)
  assumed = set(known.get('assumed', ())) - set(told)
  return build_pretrained(
    flat, known | told | {'assumed': assumed}, str(path) if row is None else row.name
  )


def resolve_source(source: str) -> tuple[Path, ReleasedCheckpoint | None]:
  """(where the files are on this machine, the row of the catalogue). Downloads what is not here yet."""
  if '://' in source:
    return fetch(source), None
  path = newest_match(source)
  if path:
    return path, None
  if row := find_checkpoint(source):
    return fetch(row.url, size=row.size), row
  first = (
    ' python run_pretrain.py makes one.' if source.startswith('runs/') else suggest_names(source)
  )
  raise UserError(f'{source!r} is no file or directory, and no name of the catalogue.{first}')


def newest_match(source: str) -> Path | None:
  """The path, or the last changed of those that a pattern matches; None where there is nothing."""
  path = Path(source).expanduser()
  if path.exists() or not str(path.relative_to(path.anchor)).strip('.'):
    return path
  matches = sorted(
    Path(path.anchor).glob(str(path.relative_to(path.anchor))),
    key=lambda match: match.stat().st_mtime,
  )
  return matches[-1] if matches else None


def read_run_directory(path: Path) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known) of a run directory of ours."""
  config = read_run_config(path)
  params, step = load_newest_params(path)
  facts = read_run_preprocessing(path) | {
    'model': config.model,
    'labels': read_run_labels(path),
    'loss': config.loss,
    'step': step,
  }
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  if config.mask.target:
    flat = {name: array for name, array in flat.items() if not name.startswith(MASKING_PREFIXES)}
    facts |= {
      'labels': (),
      'notes': ('learned from masked patches, not from labels: it has no head',),
    }
  return flat, facts


def read_model_file(path: Path, *, heads: int) -> tuple[dict[str, np.ndarray], dict]:
  """(the flat tree, what is known) of a file or a directory of somebody else's. UserError for a layout that nobody knows."""
  arrays = open_arrays(path)
  folder = path if path.is_dir() else path.parent
  if find_google_prefix(arrays) is not None:
    return read_google(arrays)
  if is_resnet(arrays):
    return read_resnet(arrays)
  if is_efficientnet(arrays):
    return read_efficientnet(arrays, read_optional_json(folder / 'config.json'))
  if is_timm(arrays):
    return read_timm(arrays, read_optional_json(folder / 'config.json'), heads=heads)
  if is_huggingface(arrays):
    config, preprocessor = (
      read_optional_json(folder / name) for name in ('config.json', 'preprocessor_config.json')
    )
    return read_huggingface(arrays, config, preprocessor, heads=heads)
  raise UserError(
    f'{path} holds no model that is known here: its arrays are {summarize_array_names(arrays)}'
  )


def summarize_array_names(arrays: LazyArrays) -> str:
  """The first names, in words."""
  first = list(arrays)[:3]
  return (
    ', '.join(first) + (f' and {len(arrays) - 3} more' if len(arrays) > 3 else '')
    if first
    else 'none at all'
  )


def read_optional_json(path: Path) -> dict | None:
  """A JSON object, or None where there is no such file."""
  try:
    content = json.loads(path.read_text()) if path.is_file() else None
  except (ValueError, OSError) as error:
    raise UserError(f'{path} is no readable JSON: {error}') from None
  if content is not None and not isinstance(content, dict):
    raise UserError(f'{path} holds {type(content).__name__}, and a JSON object is expected')
  return content


def read_sidecar(path: Path) -> dict:
  """What `export` says of an .npz in the .json beside it. One that says other things is somebody else's."""
  facts = (read_optional_json(path.with_suffix('.json')) if path.suffix == '.npz' else None) or {}
  return lists_to_tuples(facts) if facts.keys() <= set(SIDECAR_FIELDS) else {}


def lists_to_tuples(facts: dict) -> dict:
  """JSON's lists as tuples."""
  return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def catalogue_facts(row: ReleasedCheckpoint | None) -> dict:
  """What the catalogue says of a file."""
  if row is None:
    return {}
  facts = {'accuracy': row.accuracy, 'accuracy_from': row.accuracy_from, 'row': row}
  return facts | ({'labels': imagenet_class_names(row.labels)} if row.labels else {})


def parse_overrides(said: dict) -> dict:
  """The overrides by the names and in the units that facts have."""
  facts = {name: value for name, value in said.items() if name not in ('mean', 'std')}
  if said.get('positions', 'corner') not in RESAMPLE_METHODS:
    raise UserError(
      f'positions={said["positions"]!r}.{did_you_mean(said["positions"], RESAMPLE_METHODS)}'
    )
  for name, fact in (('mean', 'mean'), ('std', 'scale')):
    if name in said:
      values = (said[name],) * 3 if isinstance(said[name], int | float) else tuple(said[name])
      if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise UserError(
          f'{name}={said[name]}: expected three shares of the range of a pixel, such as 0.5,0.5,0.5'
        )
      facts[fact] = tuple(round(255 * value, 6) for value in values)  # As a person would write it.
  if 'short_side' in said:
    facts['wanted_short_side'] = facts.pop('short_side')
  if 'size' in said:
    size = facts.pop('size')
    facts['wanted'] = (size, size) if isinstance(size, int) else tuple(size)
    if len(facts['wanted']) != 2 or min(facts['wanted']) < 1:
      raise UserError(f'size={size}: expected pixels, one number for a square or height,width')
  return facts


def build_pretrained(flat: dict[str, np.ndarray], facts: dict, source: str) -> PretrainedModel:
  """Arrays and facts, put together and checked against each other."""
  notes = list(facts.get('notes', ()))
  if 'patch' in facts:
    flat, note = resize_patch_kernel(flat, facts['patch'], source)
    notes.append(note)
  fields = {name: facts[name] for name in (*MODEL_OVERRIDES, 'mean', 'scale') if name in facts}
  if 'model' in facts:
    config = dataclasses.replace(facts['model'], **fields)
    classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
  else:
    config, classes = infer_architecture(flat, source=source, **fields)
  config = validate(Config(model=config, steps=1)).model
  model = build_model(config, classes)
  heads = getattr(model.shape, 'heads', 0)
  if facts.get('heads', heads) != heads:
    raise UserError(f'{source} has {heads or "no"} heads, and heads={facts["heads"]} was said')
  flat, native, size, more = resample_to_size(flat, model, facts, source)
  check_array_shapes(flat, model, size, source)
  labels, assumption = resolve_labels(facts, classes, source)
  return PretrainedModel(
    source=source + (f' at step {facts["step"]}' if 'step' in facts else ''),
    params=flax.traverse_util.unflatten_dict(flat, sep='/'),
    config=config,
    classes=classes,
    preprocessing={
      'size': size,
      'crop': facts.get('crop', 'resize'),
      'short_side': scale_short_side(facts, native, size),
      'mean': config.mean,
      'scale': config.scale,
    },
    labels=labels,
    loss=facts.get('loss', 'softmax'),
    notes=(*notes, *more, *assumption, *catalogue_notes(facts.get('row'), classes, native)),
    assumed=tuple(sorted(facts['assumed'])),
    accuracy=facts.get('accuracy'),
    accuracy_from=facts.get('accuracy_from', ''),
  )


def resample_to_size(
  flat: dict[str, np.ndarray], model: nn.Module, facts: dict, source: str
) -> tuple[dict[str, np.ndarray], tuple[int, int], tuple[int, int], list[str]]:
  """(the flat tree for images of the size that is wanted, the size it came with, the size it has now, what was done)."""
  if POSITION_EMBEDDING not in flat:
    native = facts.get('size') or default_image_size(facts, model)
    size = facts.get('wanted', native)
    model.shape.grid(size)  # UserError where the model can not take it.
    return flat, native, size, []
  old = infer_position_grid(flat, model, facts.get('size') or facts.get('wanted'), source)
  native = tuple(side * step for side, step in zip(old, model.shape.stride, strict=True))
  size = facts.get('wanted', native)
  grid = model.shape.grid(size)
  if grid == old:
    return flat, native, size, []
  tokens = flat[POSITION_EMBEDDING].shape[1] + grid[0] * grid[1] - old[0] * old[1]
  table = resample_positions(
    flat[POSITION_EMBEDDING], tokens, grid, old, facts.get('positions', 'corner')
  )
  done = f'position embeddings resampled from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}'
  return flat | {POSITION_EMBEDDING: table}, native, size, [done]


def default_image_size(facts: dict, model: nn.Module) -> tuple[int, int]:
  """Where the arrays don't tell: the catalogue's, or what the caller wants, or the most of 224 pixels that divides."""
  if row := facts.get('row'):
    return row.pixels, row.pixels
  return facts.get('wanted') or tuple(224 // step * step for step in model.shape.stride)


def catalogue_notes(
  row: ReleasedCheckpoint | None, classes: int, native: tuple[int, int]
) -> list[str]:
  """Where a file is not what the catalogue says of it, and the catalogue's own note."""
  if row is None:
    return []
  out = [row.note] if row.note else []
  if row.classes not in (None, classes):
    out.append(f'the catalogue says {row.classes:,} classes, and there are {classes:,}')
  if native != (row.pixels, row.pixels):
    out.append(
      f'the catalogue says {row.pixels} pixels, and its positions are for {native[0]}x{native[1]}'
    )
  return out


def resize_patch_kernel(
  flat: dict[str, np.ndarray], side: int, source: str
) -> tuple[dict[str, np.ndarray], str]:
  """(the flat tree with patch kernels of another side, what is to be said of it). UserError for a hybrid."""
  kernel = flat.get(PATCH_KERNEL)
  if kernel is None or kernel.ndim != 4 or kernel.shape[2] != 3 or side < 1:
    raise UserError(f'{source}: its patches are not of pixels, and cannot be resized to {side}')
  old = f'{kernel.shape[0]}x{kernel.shape[1]}'
  return flat | {
    PATCH_KERNEL: pi_resize(kernel, (side, side))
  }, f'patch kernels resized from {old} to {side}x{side}'


def scale_short_side(facts: dict, native: tuple[int, int], size: tuple[int, int]) -> int:
  """What a 'center' crop resizes the short side to first, in the same proportion to the size as it was in training."""
  if 'wanted_short_side' in facts:  # Of the size as it is now.
    return max(facts['wanted_short_side'], max(size))
  then = facts.get('short_side') or round(max(native) * 256 / 224)
  return (
    max(round(then * max(size) / max(native)), max(size))
    if size != native
    else max(then, max(size))
  )


def resolve_labels(facts: dict, classes: int, source: str) -> tuple[tuple[str, ...], list[str]]:
  """(the names of the classes, what was assumed). UserError where there are more or fewer than logits."""
  labels = tuple(facts.get('labels') or ())
  if labels and len(labels) != classes:
    raise UserError(f'{source}: {len(labels)} labels for {classes} classes')
  if labels or classes not in DEFAULT_LABEL_SETS:
    return labels, []
  return imagenet_class_names(DEFAULT_LABEL_SETS[classes]), [
    f"{classes:,} classes are taken for {DEFAULT_LABEL_SETS[classes]}'s"
  ]
