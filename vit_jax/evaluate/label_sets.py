"""Test sets of ImageNet classes in which an image has a set of correct labels.

Predictions are among the classes of the test set. Images with an empty set are skipped and counted.

  real       ImageNet's validation images, relabelled (arXiv 2006.07159).
  v2         New images, collected like the original ones (arXiv 1902.10811).
  a          Adversarially filtered photographs of 200 classes (arXiv 1907.07174).
  r          Renditions of 200 classes (arXiv 2006.16241).
  objectnet  Everyday objects in unusual poses, of the classes that it shares with ImageNet
             (Barbu et al., NeurIPS 2019).
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
from vit_jax.evaluate.outputs import is_hit, top_k_among

_IMAGENET_CLASSES = 1000

# Protocol -> its images and their split, by default. Sets made for testing are used completely.
LABEL_SET_SOURCES = {
  'real': ('tfds:imagenet2012', 'validation'),
  'v2': ('tfds:imagenet_v2/matched-frequency', 'test'),
  'a': ('tfds:imagenet_a', 'test'),
  'r': ('tfds:imagenet_r', 'test'),
  'objectnet': ('', ''),
}

# (labels, name of an example) -> labels. It is pickled for the workers of the loader.
LabelRule = Callable[[tuple[int, ...], str], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class RelabelledSource:
  """A source whose labels are replaced by those of a rule, and whose images are cropped."""

  source: Source
  label_rule: LabelRule
  max_labels: int
  crop_border: int = 0  # Pixels that are removed on every side.
  # A benchmark with published numbers, whose images are decoded as those of a published data set.
  is_benchmark: bool = True

  def is_user_file(self, i: int) -> bool:
    """Return whether example `i` is a file of the user."""
    return not self.is_benchmark and self.source.is_user_file(i)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[int, ...], str]:
    data, labels, name = self.source[i]
    return self._crop(data, name), self.label_rule(labels, name), name

  def _crop(self, data: bytes | np.ndarray, name: str) -> bytes | np.ndarray:
    if not self.crop_border:
      return data
    from vit_jax.data.decode import decode_image

    inside = slice(self.crop_border, -self.crop_border)
    return decode_image(data, name=name, max_pixels=100_000_000)[inside, inside]


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetByClass:
  """The label rule that maps each class of the source to a set of labels."""

  class_sets: tuple[tuple[int, ...], ...]

  def __call__(self, labels: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the labels in the sets of all `labels`."""
    del name
    return tuple(new for label in labels for new in self.class_sets[label])


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetByName:
  """The label rule that looks up a validation image of ImageNet by the number in its name."""

  image_sets: tuple[tuple[int, ...], ...]

  def __call__(self, labels: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the labels of an image. Raises UserError if its name has no known number."""
    del labels
    number = re.search(r'ILSVRC2012_val_(\d{8})', name)
    if not number or not 1 <= int(number[1]) <= len(self.image_sets):
      raise UserError(
        f'{name}: ReaL has labels for ILSVRC2012_val_00000001 to {len(self.image_sets):08}, '
        'and this name has no such number'
      )
    return self.image_sets[int(number[1]) - 1]


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetBenchmark:
  """An opened test set. Labels are places in `class_indices`."""

  source: RelabelledSource
  class_indices: tuple[int, ...]  # The ImageNet classes that a prediction is chosen from.

  def match_logits(self, labels: tuple[str, ...], *, classes: int, source: str) -> np.ndarray:
    """Return the index of the logit of each class in `class_indices`.

    `labels` are the names of the model's `classes` logits, or (). Raises UserError, which names the
    model `source`, if the model lacks a class.
    """
    every = imagenet_synsets('imagenet1k')
    if not labels and classes != _IMAGENET_CLASSES:
      raise UserError(
        f'{source} has {classes:,} classes without names, and the images are of some of '
        f"ImageNet's {_IMAGENET_CLASSES:,} classes"
      )
    names = tuple(every[i] for i in self.class_indices)
    indices, _ = match_classes(names, labels or every, classes=classes, source=source)
    return indices


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSetCounts:
  """Numbers of images of a test set."""

  correct: int
  correct_top5: int
  examples: int
  skipped: int  # Images without a correct label.


def open_label_set_benchmark(
  protocol: str, data: str = '', *, split: str = '', dir: str = '', mapping: str = ''
) -> LabelSetBenchmark:
  """Open the test set of a protocol, a key of `LABEL_SET_SOURCES`.

  Args:
    protocol: Which test set.
    data: The source of its images, if it is not the default one.
    split: The split, if it is not the default one.
    dir: The directory of TFDS data sets.
    mapping: The directory of ObjectNet's mapping files, by default beside the images.

  Raises UserError if the data are missing or have other classes.
  """
  source = _open_label_set_images(protocol, data, split=split, dir=dir)
  every_class = tuple(range(_IMAGENET_CLASSES))
  if protocol == 'real':
    image_sets = imagenet_real_labels()
    max_labels = max(map(len, image_sets))
    relabelled = RelabelledSource(source, LabelSetByName(image_sets), max_labels)
    return LabelSetBenchmark(relabelled, every_class)
  if protocol == 'objectnet':
    directory = Path(mapping) if mapping else Path(data.partition(':')[2]).parent / 'mappings'
    class_sets = read_objectnet_classes(source.label_names, directory)
    shared = tuple(sorted({index for each in class_sets for index in each}))
    relabelled = _relabel_source(source, class_sets, shared, crop_border=OBJECTNET_BORDER)
    return LabelSetBenchmark(relabelled, shared)
  indices = imagenet_class_indices(source.label_names, data or LABEL_SET_SOURCES[protocol][0])
  class_indices = imagenet_subset_classes(protocol) if protocol in ('a', 'r') else every_class
  class_sets = tuple((index,) for index in indices)
  return LabelSetBenchmark(_relabel_source(source, class_sets, class_indices), class_indices)


def _open_label_set_images(protocol: str, data: str, *, split: str, dir: str) -> Source:
  """Open all images of a set that was made for testing, or the held-out images of ImageNet."""
  default, default_split = LABEL_SET_SOURCES[protocol]
  if not (data or default):
    raise UserError(
      f'{protocol}: its images are not in TFDS: give their directory as folder:PATH/images'
    )
  if data in ('', default):
    return open_source(default, split or default_split, dir=dir)
  return open_source(data, split or ('' if protocol == 'real' else 'all'), dir=dir)


def _relabel_source(
  source: Source,
  class_sets: tuple[tuple[int, ...], ...],
  class_indices: tuple[int, ...],
  *,
  crop_border: int = 0,
) -> RelabelledSource:
  """Map each class of `source` to its set of ImageNet classes, as places in `class_indices`.

  Classes that are not in `class_indices` are dropped.
  """
  place = {index: i for i, index in enumerate(class_indices)}
  class_sets = tuple(tuple(place[i] for i in each if i in place) for each in class_sets)
  max_labels = max(1, *map(len, class_sets)) * source.max_labels
  return RelabelledSource(source, LabelSetByClass(class_sets), max_labels, crop_border)


def imagenet_class_indices(names: tuple[str, ...], data: str) -> list[int]:
  """Return the index among the classes of ImageNet-1k of each name.

  Names are synsets, words, or the indices themselves. Raises UserError, which names the source
  `data`, if they are none of these.
  """
  numbers = tuple(map(str, range(_IMAGENET_CLASSES)))
  for known in (imagenet_synsets('imagenet1k'), imagenet_class_names('imagenet1k'), numbers):
    place = {name: i for i, name in enumerate(known)}
    if set(names) <= place.keys():
      return [place[name] for name in names]
  odd = next(name for name in names if name not in imagenet_synsets('imagenet1k'))
  raise UserError(
    f"{data} has a class {odd!r}, which is not one of ImageNet's: expected synsets such as "
    'n01440764, names or numbers'
  )


def evaluate_label_set(
  evaluator: Evaluator, params: dict, benchmark: LabelSetBenchmark, logit_indices: np.ndarray
) -> LabelSetCounts:
  """Evaluate every readable image of a test set once, by the logits of its classes."""
  rows = evaluator.rows(params, benchmark.source, top_k_among(tuple(logit_indices.tolist())))
  return count_label_set_hits(rows['top5'][rows['mask']], rows['label'][rows['mask']])


def count_label_set_hits(top: np.ndarray, labels: np.ndarray) -> LabelSetCounts:
  """Count the hits of predictions [n, 5], the best first, among labels [n, m] padded with -1."""
  labelled = (labels >= 0).any(axis=1)
  hits = is_hit(top, labels)[labelled]  # [n, 5]; no prediction is -1.
  return LabelSetCounts(
    correct=int(hits[:, 0].sum()),
    correct_top5=int(hits.any(axis=1).sum()),
    examples=len(hits),
    skipped=int((~labelled).sum()),
  )
