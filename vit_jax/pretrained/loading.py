"""Load a pre-trained model from a catalogue name, a path, a URL or the Hugging Face hub.

catalogue.py knows which checkpoints are released. npz.py, timm_vit.py, timm_efficientnet.py and
huggingface.py convert their layouts. architecture.py infers the architecture from the arrays.
"""

import dataclasses
from pathlib import Path

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
from vit_jax.data.preprocessing import STEP_CHECKS, Preprocessing, check_step
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.families import build_model
from vit_jax.models.lora import merge_adapters
from vit_jax.pretrained.adapt import MASKING_PREFIXES
from vit_jax.pretrained.adapters import is_adapter_file, read_adapters
from vit_jax.pretrained.architecture import (
  check_array_shapes,
  count_channels,
  infer_architecture,
)
from vit_jax.pretrained.arrays import (
  PATCH_KERNEL,
  LazyArrays,
  head_classes,
  open_arrays,
  summarize_list,
)
from vit_jax.pretrained.catalogue import (
  ReleasedCheckpoint,
  find_checkpoint,
  find_checkpoint_of_file,
  suggest_names,
)
from vit_jax.pretrained.download import fetch
from vit_jax.pretrained.hub import fetch_from_hub, is_hub_name
from vit_jax.pretrained.huggingface import is_huggingface, read_huggingface
from vit_jax.pretrained.image_size import resample_to_size
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.npz import find_google_prefix, is_resnet, read_google, read_resnet
from vit_jax.pretrained.preprocessing import (
  fit_statistics,
  merge_facts,
  resolve_preprocessing,
  sidecar_steps,
)
from vit_jax.pretrained.resample import RESAMPLE_METHODS, pi_resize
from vit_jax.pretrained.timm_efficientnet import is_efficientnet, read_efficientnet
from vit_jax.pretrained.timm_vit import is_timm, read_timm
from vit_jax.runtime.files import read_json_object, split_pattern
from vit_jax.settings.conditions import POSITION_TABLES
from vit_jax.settings.limits import CHANNELS

# Overrides of `load`, which are also flags of the commands.
MODEL_OVERRIDES = ('gelu', 'norm_eps', 'dtype', 'position')  # Fields of ModelConfig.
LOAD_OVERRIDES = (
  *MODEL_OVERRIDES, 'heads', 'mean', 'std', 'size', 'patch', 'positions', 'crop', 'short_side',
  'interpolation', 'orient', 'jpeg_dct', 'labels', 'base',
)  # fmt: skip
# Settings that no array shows.
UNSEEN_SETTINGS = ('rope_theta', 'rope_grid', 'rope_register_theta', 'norm')
# Fields of the .json file that `export` writes beside an .npz file. Older ones have a short side.
SIDECAR_FIELDS = (
  *MODEL_OVERRIDES, 'variant', 'loss', 'labels', 'short_side',
  *(field.name for field in dataclasses.fields(Preprocessing)),
)  # fmt: skip
# Numbers of classes that imply a label set if the file names none.
DEFAULT_LABEL_SETS = {1000: 'imagenet1k', 21843: 'imagenet21k'}


def load(source: str, **overrides) -> PretrainedModel:
  """Load a pre-trained model, with its architecture inferred from its arrays.

  `source` is one of

  - a catalogue name, such as 'augreg/B_16' or 'imagenet21k+imagenet2012/ViT-B_16-224'
  - an .npz or .safetensors file, or a Hugging Face or timm directory
  - a file of adapters, as `vit-jax export --adapters` writes it
  - a run directory of this package, or a pattern such as ``runs/quickstart-*``, whose
    newest match is loaded
  - a model of the Hugging Face hub, such as 'hf:facebook/dinov2-small' or 'hf:ORG/NAME@REVISION'
  - the URL of a file (https://, gs://, …), which is downloaded to the cache

  `overrides` are facts that arrays do not determine. They replace the file's. None has no effect.

  - gelu: 'tanh', 'erf' or 'quick'
  - norm_eps: epsilon of the layer norms
  - heads: number of heads, for files with two-dimensional attention kernels
  - mean, std: normalization of pixels in [0, 1], one or three numbers
  - crop: 'resize', 'center', 'squash', 'border' or 'none', as in data/preprocessing.py
  - short_side: pixels to which 'center' scales the short side first
  - interpolation: 'tf_bilinear', 'pil_bicubic' and others, as in data/resize.py
  - orient: 'exif' turns photos upright, 'ignore' does not, 'auto' depends on the source
  - jpeg_dct: 'fast' decodes JPEGs as TensorFlow does, 'accurate' as Pillow does
  - labels: names of the classes
  - dtype: dtype of the computation
  - position: kind of position embedding
  - size: image size in pixels, one number or (height, width), to which position embeddings are
    resampled. 'native' is the size of those in the file
  - positions: resampling method, 'corner', 'half_pixel' or 'bicubic'
  - patch: patch size in pixels, to which patch kernels are resized as in FlexiViT
  - base: the source of the model that a file of adapters belongs to

  Raises UserError if the source does not exist, is not readable, or is not a complete, known model.
  """
  for name in overrides:
    if name not in LOAD_OVERRIDES:
      hint = did_you_mean(name, LOAD_OVERRIDES)
      raise UserError(f'load({source!r}): unknown setting {name!r}.{hint}')
  given = {name: value for name, value in overrides.items() if value is not None}
  path, checkpoint = resolve_source(source)
  base, heads = given.pop('base', None), given.get('heads', 0)
  flat, file_facts = read_source(path, base=base, heads=heads)
  if 'model' not in file_facts:
    checkpoint = checkpoint or find_checkpoint_of_file(path)
  known_facts = read_sidecar(path) | catalogue_facts(checkpoint) | parse_overrides(given)
  facts = merge_facts(file_facts, known_facts)
  name = source if is_hub_name(source) else str(path)
  return build_pretrained(flat, facts, checkpoint.name if checkpoint else name)


def resolve_source(source: str) -> tuple[Path, ReleasedCheckpoint | None]:
  """Return the local path and, if known, the catalogue entry.

  Downloads files that are not cached.
  """
  if is_hub_name(source):
    return fetch_from_hub(source), None
  if '://' in source:
    return fetch(source), None
  path = newest_match(source)
  if path:
    return path, None
  if checkpoint := find_checkpoint(source):
    return fetch(checkpoint.url, size=checkpoint.size), checkpoint
  is_run = source.startswith('runs/')
  hint = ' python run_pretrain.py creates a run.' if is_run else suggest_names(source)
  raise UserError(f'{source!r} is neither a file, a directory nor a catalogue name.{hint}')


def newest_match(source: str) -> Path | None:
  """Return the path, or the last modified match of a pattern, or None without a match."""
  path = Path(source).expanduser()
  if path.exists():
    return path
  directory, pattern = split_pattern(source)
  return max(directory.glob(pattern), key=lambda match: match.stat().st_mtime, default=None)


def read_source(path: Path, *, base: str | None, heads: int) -> tuple[dict[str, np.ndarray], dict]:
  """Return the flat tree and the facts of a run directory, a file of adapters or a model file.

  Raises UserError if `base` is given for anything but adapters.
  """
  if is_adapter_file(path):
    return read_adapters(path, base, load)
  if base:
    raise UserError(f'base={base!r} is only for a file of adapters, which {path} is not')
  if (path / 'config.json').is_file() and (path / 'preprocessing.json').is_file():
    return read_run_directory(path)
  arrays = open_arrays(path)
  flat, facts = read_model_file(arrays, path, heads=heads)
  return flat, facts | {'notes': (*arrays.notes, *facts.get('notes', ()))}


def read_run_directory(path: Path) -> tuple[dict[str, np.ndarray], dict]:
  """Return the flat tree of the newest checkpoint of a run directory, and the facts of the run."""
  config = read_run_config(path)
  params, step = load_newest_params(path)
  steps = {name: v for name, v in read_run_preprocessing(path).to_dict().items() if v is not None}
  facts = steps | {
    'size': config.data.size, 'target_size': steps['size'], 'stated_size': steps['size'],
    'positions': config.init_positions, 'model': config.model, 'labels': read_run_labels(path),
    'loss': config.loss, 'step': step,
  }  # fmt: skip
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  flat = merge_adapters(flat, config.lora) if config.lora.rank else flat
  if config.mask.target:
    flat = {name: array for name, array in flat.items() if not name.startswith(MASKING_PREFIXES)}
    facts |= {'labels': (), 'notes': ('trained on masked patches without labels: it has no head',)}
  return flat, facts


def read_model_file(
  arrays: LazyArrays, path: Path, *, heads: int
) -> tuple[dict[str, np.ndarray], dict]:
  """Return the flat tree and the facts of a file or directory of another library.

  `heads` is the number of heads, or 0 to infer it. Raises UserError for an unknown layout.
  """
  folder = path if path.is_dir() else path.parent
  config = folder / 'config.json'
  if find_google_prefix(arrays) is not None:
    return read_google(arrays)
  if is_resnet(arrays):
    return read_resnet(arrays)
  if is_efficientnet(arrays):
    return read_efficientnet(arrays, read_optional_json(config))
  if is_timm(arrays):
    return read_timm(arrays, read_optional_json(config), heads=heads)
  if is_huggingface(arrays):
    preprocessor = read_optional_json(folder / 'preprocessor_config.json')
    return read_huggingface(arrays, read_optional_json(config), preprocessor, heads=heads)
  names = summarize_list(list(arrays), limit=3, separator=', ') or 'none'
  raise UserError(f'{path} contains no known model; its arrays are: {names}')


def read_optional_json(path: Path) -> dict | None:
  """Return the JSON object in a file, or None if the file does not exist."""
  return read_json_object(path) if path.is_file() else None


def read_sidecar(path: Path) -> dict:
  """Return the facts in the .json file that `export` writes beside an .npz file.

  A .json file with other fields is not ours and is ignored.
  """
  facts = (read_optional_json(path.with_suffix('.json')) if path.suffix == '.npz' else None) or {}
  if not facts.keys() <= set(SIDECAR_FIELDS):
    return {}
  facts = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
  facts = sidecar_steps(facts)
  for name in facts.keys() & STEP_CHECKS:
    check_step(name, facts[name], str(path.with_suffix('.json')))
  return {name: value for name, value in facts.items() if value is not None}


def catalogue_facts(checkpoint: ReleasedCheckpoint | None) -> dict:
  """Return the facts that the catalogue states about a checkpoint."""
  if checkpoint is None:
    return {}
  facts = {
    'accuracy': checkpoint.accuracy,
    'accuracy_from': checkpoint.accuracy_from,
    'checkpoint': checkpoint,
  }
  labels = checkpoint.labels
  return facts | ({'labels': imagenet_class_names(labels)} if labels else {})


def parse_overrides(overrides: dict) -> dict:
  """Convert the overrides of `load` to the names and units of facts: pixel values in [0, 255]."""
  facts = {name: value for name, value in overrides.items() if name not in ('mean', 'std')}
  method = overrides.get('positions', 'corner')
  if method not in RESAMPLE_METHODS:
    raise UserError(f'positions={method!r}.{did_you_mean(method, RESAMPLE_METHODS)}')
  for name, fact in (('mean', 'mean'), ('std', 'scale')):
    if name in overrides:
      facts[fact] = parse_pixel_statistics(name, overrides[name])
  if 'short_side' in overrides:
    facts['target_short_side'] = facts.pop('short_side')
  for name in facts.keys() & STEP_CHECKS:
    if name not in ('size', 'short_side'):
      check_step(name, facts[name], 'load')
  if overrides.get('size') == 'native':
    del facts['size']
    return facts | {'keep_size': True}
  if 'size' in overrides:
    size = facts.pop('size')
    facts['target_size'] = (size, size) if isinstance(size, int) else tuple(size)
    if len(facts['target_size']) != 2 or min(facts['target_size']) < 1:
      raise UserError(f'size={size}: expected pixels, one number for a square or height,width')
  return facts


def parse_pixel_statistics(name: str, value) -> tuple[float, ...]:
  """Convert one or three numbers in [0, 1] to three in [0, 255], rounded to six decimals.

  `fit_statistics` makes one of them for grey images.
  """
  values = (value,) if isinstance(value, int | float) else tuple(value)
  values = values * 3 if len(values) == 1 else values
  if len(values) != 3 or not all(0 <= value <= 1 for value in values):
    raise UserError(f'{name}={value}: expected three numbers in [0, 1], such as 0.5,0.5,0.5')
  return tuple(round(255 * value, 6) for value in values)


def build_pretrained(flat: dict[str, np.ndarray], facts: dict, source: str) -> PretrainedModel:
  """Build the model of a flat tree and its facts.

  Raises UserError if they contradict each other.
  """
  notes = [*facts.get('notes', ())]
  if 'patch' in facts:
    flat, note = resize_patch_kernel(flat, facts['patch'], source)
    notes.append(note)
  facts, statistics_notes = fit_statistics(facts, count_channels(flat, source), source)
  notes += statistics_notes
  stated = (*MODEL_OVERRIDES, 'variant', 'channels', 'mean', 'scale', 'pool', *UNSEEN_SETTINGS)
  fields = {name: facts[name] for name in stated if name in facts}
  if 'model' in facts:
    config, classes = dataclasses.replace(facts['model'], **fields), head_classes(flat)
  else:
    config, classes = infer_architecture(flat, source=source, **fields)
  config = validate(Config(model=config, steps=1)).model
  model = build_model(config, classes)
  heads = getattr(model.shape, 'heads', 0)
  if facts.get('heads', heads) != heads:
    raise UserError(f'{source} has {heads or "no"} heads, which contradicts heads={facts["heads"]}')
  flat, native_size, size, resample_notes = resample_to_size(flat, model, facts, source)
  check_array_shapes(flat, model, size, source)
  labels, label_notes = resolve_labels(facts, classes, source)
  notes += [*resample_notes, *label_notes]
  notes += catalogue_notes(facts.get('checkpoint'), classes, native_size)
  return PretrainedModel(
    source=source + (f' at step {facts["step"]}' if 'step' in facts else ''),
    params=flax.traverse_util.unflatten_dict(flat, sep='/'),
    config=config,
    classes=classes,
    preprocessing=resolve_preprocessing(
      facts, config, native_size=native_size, size=size, source=source
    ),
    labels=labels,
    loss=facts.get('loss', 'softmax'),
    notes=tuple(notes),
    assumed=tuple(sorted(facts['assumed'])),
    positions=facts.get('positions', 'corner') if config.position in POSITION_TABLES else 'corner',
    accuracy=facts.get('accuracy'),
    accuracy_from=facts.get('accuracy_from', ''),
  )


def catalogue_notes(
  checkpoint: ReleasedCheckpoint | None, classes: int, native_size: tuple[int, int]
) -> list[str]:
  """Return the catalogue's note, and the facts in which the file differs from the catalogue."""
  if checkpoint is None:
    return []
  notes = [checkpoint.note] if checkpoint.note else []
  if checkpoint.classes not in (None, classes):
    notes.append(f'the catalogue lists {checkpoint.classes:,} classes, the file has {classes:,}')
  pixels = checkpoint.pixels
  if native_size != (pixels, pixels):
    h, w = native_size
    notes.append(
      f'the catalogue lists {pixels} pixels, the file has position embeddings for {h}x{w}'
    )
  return notes


def resize_patch_kernel(
  flat: dict[str, np.ndarray], side: int, source: str
) -> tuple[dict[str, np.ndarray], str]:
  """Resize the patch kernel to `side` pixels, and return the flat tree and a note.

  Raises UserError for a hybrid, whose patches are not of pixels.
  """
  kernel = flat.get(PATCH_KERNEL)
  if kernel is None or kernel.ndim != 4 or kernel.shape[2] not in CHANNELS or side < 1:
    raise UserError(f'{source}: the patches are not of pixels and cannot be resized to {side}')
  p, q = kernel.shape[:2]
  flat = flat | {PATCH_KERNEL: pi_resize(kernel, (side, side))}
  return flat, f'patch kernels resized from {p}x{q} to {side}x{side}'


def resolve_labels(facts: dict, classes: int, source: str) -> tuple[tuple[str, ...], list[str]]:
  """Return the names of the classes, and notes about assumptions.

  Raises UserError if the number of names differs from the number of classes.
  """
  labels = tuple(facts.get('labels') or ())
  if labels and len(labels) != classes:
    raise UserError(f'{source}: {len(labels)} labels for {classes} classes')
  if labels or classes not in DEFAULT_LABEL_SETS:
    return labels, []
  label_set = DEFAULT_LABEL_SETS[classes]
  return imagenet_class_names(label_set), [
    f'{classes:,} classes: assuming the labels of {label_set}'
  ]
