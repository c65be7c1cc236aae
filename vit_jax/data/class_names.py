"""Which logit an example's label means: the classes of a data set found among those of a model, by name."""

import collections

import numpy as np

from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets
from vit_jax.errors import UserError

_IMAGENET_LABEL_LISTS = ('imagenet1k', 'imagenet21k')
_IMAGENET_VALIDATION_EXAMPLES = 50_000  # Images of ImageNet-1k's validation split.


def match_classes(
  theirs: tuple[str, ...], ours: tuple[str, ...], *, classes: int, source: str
) -> tuple[np.ndarray, list[str]]:
  """(for each of a data set's classes the number of its logit, what the person should know).

  `theirs`: the data set's names. `ours`: those of the model's `classes` logits, or () where nobody says. The data set may have
  them in another order, may have only some of them, and may call ImageNet's by their synsets. UserError, with the names that
  differ, where it has a class that the model lacks, and where a name could mean two logits.
  """
  if theirs == ours:
    return np.arange(classes, dtype=np.int32), []
  if not ours:
    if len(theirs) != classes:
      raise UserError(
        f'the data has {len(theirs):,} classes, and {source} {classes:,} without names: say them with --labels'
      )
    return np.arange(classes, dtype=np.int32), [
      "the model does not name its classes: they are taken to be in the data's order"
    ]
  names = next((names for names in _candidate_class_names(ours) if set(theirs) <= set(names)), None)
  if names is None:
    raise UserError(_format_class_mismatch(theirs, ours, source))
  often, place = collections.Counter(names), {name: i for i, name in enumerate(names)}
  if twice := [name for name in theirs if often[name] > 1]:
    raise UserError(
      f'{source} has several classes of the name {twice[0]!r}: say names that differ with --labels'
    )
  columns = np.array([place[name] for name in theirs], np.int32)
  if len(theirs) < classes:
    return columns, [
      f'the data has {len(theirs):,} of the {classes:,} classes: a prediction of any other is wrong'
    ]
  same_order = (columns == np.arange(classes)).all()
  return columns, [] if same_order else [
    'the data has the classes in another order: they are matched by name'
  ]


def _candidate_class_names(ours: tuple[str, ...]) -> list[tuple[str, ...]]:
  """The model's own names of its classes, and, where they are ImageNet's, the synsets, which is what TFDS calls them."""
  return [
    ours,
    *(
      imagenet_synsets(which)
      for which in _IMAGENET_LABEL_LISTS
      if ours == imagenet_class_names(which)
    ),
  ]


def _format_class_mismatch(theirs: tuple[str, ...], ours: tuple[str, ...], source: str) -> str:
  """The two lists, where they are not the same."""
  some = lambda names: (
    f'{", ".join(map(repr, names[:5]))}'
    + (f' and {len(names) - 5:,} more' if len(names) > 5 else '')
  )
  ours_known, theirs_known = set(ours), set(theirs)
  lacks = [name for name in theirs if name not in ours_known]
  has = [name for name in ours if name not in theirs_known]
  only = f', and has {some(has)} instead' if has else ''
  return f'{source} has no classes {some(lacks)}, which the data has{only}; --labels names them otherwise'


def is_imagenet_validation(theirs: tuple[str, ...], *, examples: int, max_labels: int) -> bool:
  """Whether published accuracies speak of this split: its size and its classes tell it from ImageNet's others."""
  named = any(
    set(theirs) == set(names)
    for names in (imagenet_class_names('imagenet1k'), imagenet_synsets('imagenet1k'))
  )
  return named and examples == _IMAGENET_VALIDATION_EXAMPLES and max_labels == 1
