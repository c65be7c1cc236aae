"""Match the classes of a data set to those of a model by name."""

import collections
import unicodedata
from pathlib import Path

import numpy as np

from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets
from vit_jax.errors import UserError

_IMAGENET_LABEL_LISTS = ('imagenet1k', 'imagenet21k')
_IMAGENET_VALIDATION_EXAMPLES = 50_000  # Images of ImageNet-1k's validation split.


def normalize_class_name(name: str) -> str:
  """Return the composed form (NFC) of a name. Files from a Mac may have the decomposed form."""
  return unicodedata.normalize('NFC', name)


def read_class_names(path: Path) -> tuple[str, ...]:
  """Return the lines of a file. Raises UserError if it is not UTF-8."""
  try:
    return tuple(path.read_text(encoding='utf-8').splitlines())
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 text: {error}') from None


def check_class_names(names: tuple[str, ...], title: str):
  """Raise UserError if a name cannot be stored as a line of UTF-8, or two names look the same."""
  seen = {}
  for name in names:
    shown = name.encode('unicode_escape', 'backslashreplace').decode('ascii')
    if any('\ud800' <= char <= '\udfff' for char in name):
      raise UserError(f'{title}: the name of the class {shown} is not UTF-8; rename the class')
    if '\n' in name or '\r' in name:
      raise UserError(f'{title}: the name of the class {shown} has a line break; rename the class')
    other = seen.setdefault(normalize_class_name(name), name)
    if other != name:
      raise UserError(
        f'{title}: two classes have the name {name!r}, once with composed and once with decomposed '
        'characters (Unicode NFC and NFD); merge them'
      )


def match_classes(
  data_names: tuple[str, ...], model_names: tuple[str, ...], *, classes: int, source: str
) -> tuple[np.ndarray, list[str]]:
  """Return the index of the logit for each class of a data set, and notes for the user.

  The data set may order the classes differently, lack some, and use synsets for ImageNet's.

  Args:
    data_names: names of the data set's classes.
    model_names: names of the model's classes, or () if unknown.
    classes: number of the model's logits.
    source: name of the model, for messages.

  Raises UserError if the model lacks a class of the data set, or if a name means two logits.
  """
  if data_names == model_names:
    return np.arange(classes, dtype=np.int32), []
  if not model_names:
    if len(data_names) != classes:
      raise UserError(
        f'the data has {len(data_names):,} classes, but {source} has {classes:,} without names: '
        'name them with --labels'
      )
    note = 'the classes of the model have no names: assuming the order of the data'
    return np.arange(classes, dtype=np.int32), [note]
  wanted = tuple(map(normalize_class_name, data_names))
  candidates = [
    tuple(map(normalize_class_name, names)) for names in _candidate_class_names(model_names)
  ]
  names = next((names for names in candidates if set(wanted) <= set(names)), None)
  if names is None:
    raise UserError(_format_class_mismatch(data_names, model_names, source))
  counts, index = collections.Counter(names), {name: i for i, name in enumerate(names)}
  if ambiguous := [name for name in wanted if counts[name] > 1]:
    raise UserError(
      f'{source} has several classes named {ambiguous[0]!r}: give distinct names with --labels'
    )
  columns = np.array([index[name] for name in wanted], np.int32)
  if len(data_names) < classes:
    note = (
      f'the data has {len(data_names):,} of the {classes:,} classes: '
      'predictions of other classes count as wrong'
    )
    return columns, [note]
  if (columns == np.arange(classes)).all():
    return columns, []
  return columns, ['the data orders the classes differently: they are matched by name']


def first_different_class(model_names: tuple[str, ...], data_names: tuple[str, ...]) -> str:
  """Return the first pair of classes that differ, or their numbers; '' if the lists are equal.

  The data may use synsets for the classes of ImageNet.
  """
  names, wanted = (tuple(map(normalize_class_name, each)) for each in (model_names, data_names))
  if wanted == names or wanted in _candidate_class_names(tuple(model_names)):
    return ''
  differ = [f'{a!r} and {b!r}' for a, b in zip(names, wanted, strict=False) if a != b]
  return differ[0] if differ else f'{len(names):,} and {len(wanted):,} classes'


def _candidate_class_names(model_names: tuple[str, ...]) -> list[tuple[str, ...]]:
  """Return the model's names and, if they are ImageNet's, the synsets that TFDS uses."""
  synsets = [
    imagenet_synsets(label_set)
    for label_set in _IMAGENET_LABEL_LISTS
    if model_names == imagenet_class_names(label_set)
  ]
  return [model_names, *synsets]


def _format_class_mismatch(
  data_names: tuple[str, ...], model_names: tuple[str, ...], source: str
) -> str:
  """Describe the names that only the data set or only the model has."""

  def summarize(names: list[str]) -> str:
    more = f' and {len(names) - 5:,} more' if len(names) > 5 else ''
    return ', '.join(map(repr, names[:5])) + more

  in_model, in_data = set(model_names), set(data_names)
  missing = [name for name in data_names if name not in in_model]
  unused = [name for name in model_names if name not in in_data]
  other = f'; only the model has {summarize(unused)}' if unused else ''
  return f'{source} lacks classes of the data: {summarize(missing)}{other}; rename with --labels'


def is_imagenet_validation(data_names: tuple[str, ...], *, examples: int, max_labels: int) -> bool:
  """Return whether a split is ImageNet-1k's validation split, to which published accuracies refer.

  Its number of examples, classes and labels per image distinguish it from ImageNet's other splits.
  """
  is_imagenet = any(
    set(data_names) == set(names)
    for names in (imagenet_class_names('imagenet1k'), imagenet_synsets('imagenet1k'))
  )
  return is_imagenet and examples == _IMAGENET_VALIDATION_EXAMPLES and max_labels == 1
