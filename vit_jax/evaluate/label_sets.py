"""Test sets of ImageNet's classes with labels of their own: of each image the set of classes that are right for it, and the
classes that a prediction is chosen among. Images with an empty set are left out, and counted.

  real       ImageNet's validation images, reassessed: any label of the set is right (arXiv 2006.07159)
  v2         new images, collected as the first were (arXiv 1902.10811)
  a, r       adversarially filtered photographs; renditions. Predictions among their 200 classes (arXiv 1907.07174, 2006.16241)
  objectnet  everyday things in odd poses. Predictions among the classes that both have (Barbu et al., NeurIPS 2019)
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.class_names import match_classes
from vit_jax.data.imagenet import (
  imagenet_class_names,
  imagenet_real_labels,
  imagenet_subset_classes,
  imagenet_synsets,
)
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.evaluate.objectnet import OBJECTNET_BORDER, read_objectnet_classes

_IMAGENET_CLASSES = 1000

# Where the images are read from, unless something else is said, and the split: all of what was made for testing alone.
LABEL_SET_SOURCES = {
  'real': ('tfds:imagenet2012', 'validation'),
  'v2': ('tfds:imagenet_v2/matched-frequency', 'test'),
  'a': ('tfds:imagenet_a', 'test'),
  'r': ('tfds:imagenet_r', 'test'),
  'objectnet': ('', ''),
}


@dataclasses.dataclass(frozen=True, slots=True)
class RelabelledSource:
  """A source whose examples have the labels that a rule gives: places in a list of ImageNet's classes."""

  source: Source
  rule: Callable[
    [tuple[int, ...], str], tuple[int, ...]
  ]  # (labels, name) -> labels; pickled to the loader's workers.
  max_labels: int
  border: int = 0  # Pixels that are cut off on every side.

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[int, ...], str]:
    data, labels, name = self.source[i]
    return self._cut(data, name), self.rule(labels, name), name

  def _cut(self, data, name: str):
    if not self.border:
      return data
    from vit_jax.data.images import decode_image

    inside = slice(self.border, -self.border)
    return decode_image(data, name=name, max_pixels=100_000_000)[inside, inside]


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetByClass:
  """The set of each of the source's own classes."""

  sets: tuple[tuple[int, ...], ...]

  def __call__(self, labels: tuple[int, ...], name: str) -> tuple[int, ...]:
    del name
    return tuple(place for label in labels for place in self.sets[label])


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetByName:
  """The set of each validation image of ImageNet, by the number in its name."""

  sets: tuple[tuple[int, ...], ...]

  def __call__(self, labels: tuple[int, ...], name: str) -> tuple[int, ...]:
    del labels
    number = re.search(r'ILSVRC2012_val_(\d{8})', name)
    if not number or not 1 <= int(number[1]) <= len(self.sets):
      raise UserError(
        f'{name}: ReaL has labels of ILSVRC2012_val_00000001 to {len(self.sets):08}, and finds none of them here'
      )
    return self.sets[int(number[1]) - 1]


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetBenchmark:
  """A test set, opened."""

  source: RelabelledSource
  chosen: tuple[int, ...]  # Of ImageNet's classes, those that predictions are among.

  def columns(self, labels: tuple[str, ...], *, classes: int, source: str) -> np.ndarray:
    """Which logits of a model the chosen classes are. `labels`: of its `classes` logits, or (). UserError if one lacks."""
    every = imagenet_synsets('imagenet1k')
    if not labels and classes != _IMAGENET_CLASSES:
      raise UserError(
        f"{source} has {classes:,} classes without names, and the images have some of ImageNet's {_IMAGENET_CLASSES:,}"
      )
    columns, _ = match_classes(
      tuple(every[i] for i in self.chosen), labels or every, classes=classes, source=source
    )
    return columns


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetCounts:
  """Of a whole test set."""

  correct: int
  correct_top5: int
  examples: int
  skipped: int  # Images for which no label is right.


def open_label_set_benchmark(
  protocol: str, data: str = '', *, split: str = '', dir: str = '', mapping: str = ''
) -> LabelSetBenchmark:
  """The test set that `protocol` names. `mapping`: for ObjectNet, the directory of its mapping files.

  UserError where it is not here, or has other classes.
  """
  source = _open_label_set_images(protocol, data, split=split, dir=dir)
  if protocol == 'real':
    sets = imagenet_real_labels()
    return LabelSetBenchmark(
      RelabelledSource(source, LabelSetByName(sets), max(map(len, sets))),
      tuple(range(_IMAGENET_CLASSES)),
    )
  if protocol == 'objectnet':
    sets = read_objectnet_classes(source.label_names, _objectnet_mapping_dir(mapping, data))
    chosen = tuple(sorted({number for each in sets for number in each}))
    return LabelSetBenchmark(_relabel_source(source, sets, chosen, border=OBJECTNET_BORDER), chosen)
  sets = tuple(
    (number,)
    for number in imagenet_class_indices(source.label_names, data or LABEL_SET_SOURCES[protocol][0])
  )
  chosen = (
    imagenet_subset_classes(protocol) if protocol in ('a', 'r') else tuple(range(_IMAGENET_CLASSES))
  )
  return LabelSetBenchmark(_relabel_source(source, sets, chosen), chosen)


def _open_label_set_images(protocol: str, data: str, *, split: str, dir: str) -> Source:
  """All images of a set that was made for testing; of ImageNet, the held-out ones."""
  default, default_split = LABEL_SET_SOURCES[protocol]
  if not (data or default):
    raise UserError(
      f'{protocol}: no catalogue has its images: say where they are, as folder:PATH/images'
    )
  if data in ('', default):
    return open_source(default, split or default_split, dir=dir)
  return open_source(data, split or ('' if protocol == 'real' else 'all'), dir=dir)


def _relabel_source(
  source: Source, sets: tuple[tuple[int, ...], ...], chosen: tuple[int, ...], *, border: int = 0
) -> RelabelledSource:
  """The source with the ImageNet classes `sets` of each of its own classes, as places in `chosen` where they are in it."""
  place = {number: i for i, number in enumerate(chosen)}
  sets = tuple(tuple(place[number] for number in each if number in place) for each in sets)
  return RelabelledSource(
    source, LabelSetByClass(sets), max(1, *map(len, sets)) * source.max_labels, border
  )


def _objectnet_mapping_dir(mapping: str, data: str) -> Path:
  """What is said, or where ObjectNet's archive has it: beside `images`."""
  return Path(mapping) if mapping else Path(data.partition(':')[2]).parent / 'mappings'


def imagenet_class_indices(names: tuple[str, ...], data: str) -> list[int]:
  """The number among ImageNet-1k's classes of each name: a synset, the class in words, or that number itself."""
  numbers = tuple(map(str, range(_IMAGENET_CLASSES)))
  for known in (imagenet_synsets('imagenet1k'), imagenet_class_names('imagenet1k'), numbers):
    place = {name: i for i, name in enumerate(known)}
    if set(names) <= place.keys():
      return [place[name] for name in names]
  odd = next(name for name in names if name not in imagenet_synsets('imagenet1k'))
  raise UserError(
    f"{data} has a class {odd!r}, which is none of ImageNet's: expected synsets such as n01440764, names or numbers"
  )


def evaluate_label_set(
  subject: Evaluator, params: dict, opened: LabelSetBenchmark, columns: np.ndarray
) -> LabelSetCounts:
  """Of every image that can be read, once."""
  return count_label_set_hits(*subject.best(params, opened.source, columns))


def count_label_set_hits(best: np.ndarray, labels: np.ndarray) -> LabelSetCounts:
  """Predictions [n, 5], the best first, and the sets of labels [n, m], padded with -1, as places in the same list."""
  judged = (labels >= 0).any(axis=1)
  hits = (best[:, :, None] == labels[:, None, :]).any(axis=2)[
    judged
  ]  # [n, 5]; no prediction is -1.
  return LabelSetCounts(
    int(hits[:, 0].sum()), int(hits.any(axis=1).sum()), int(judged.sum()), int((~judged).sum())
  )
