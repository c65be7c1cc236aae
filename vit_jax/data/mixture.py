"""Labelled and pseudo-labelled examples as one source, with class probabilities as labels.

The labelled examples come first. `sampler.mixture_example` decides which of them a batch has.
Shapes: k classes.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.pseudo_labels import PseudoLabels, read_pseudo_labels, select_balanced
from vit_jax.data.sources import Source, open_unlabelled
from vit_jax.errors import UserError

# Loss -> (targets [k] of zeros and ones, label smoothing) -> smoothed targets [k]. The same
# formulas in JAX are in optim/losses.py, which decoding workers must not import.
SMOOTH_TARGETS = {
  'softmax': lambda t, s: (1 - s) * t / max(t.sum(), 1) + s / len(t),
  'sigmoid': lambda t, s: s + (1 - 2 * s) * t,
}
# Loss -> a teacher's probabilities [k] -> targets [k]. In float16 their sum is not exactly 1.
NORMALIZE_PROBABILITIES = {'softmax': lambda p: p / p.sum(), 'sigmoid': lambda p: p}


@dataclasses.dataclass(frozen=True, slots=True)
class PseudoLabelledSource:
  """Selected examples of a source, with class probabilities as labels."""

  source: Source
  pseudo_labels: PseudoLabels
  indices: np.ndarray  # Examples of `source`; an index may repeat.

  def index_checksum(self) -> str:
    """Return a checksum of the source, the pseudo-labels and the selection."""
    facts = (self.source.index_checksum(), self.pseudo_labels.checksum)
    return hashlib.blake2b(
      repr(facts).encode() + self.indices.astype('<i8').tobytes(), digest_size=8
    ).hexdigest()

  def subsample(self, n: int) -> 'PseudoLabelledSource':
    """Return `n` evenly spaced examples, or all if there are fewer."""
    rows = np.linspace(0, len(self) - 1, min(n, len(self))).astype(np.int64)
    return dataclasses.replace(self, indices=self.indices[rows])

  def is_user_file(self, i: int) -> bool:
    """Return whether example `i` is a file of the user."""
    return self.source.is_user_file(int(self.indices[i]))

  def read_ahead(self, indices: Iterable[int]):
    """Begin to read examples that are needed soon."""
    self.source.read_ahead(int(self.indices[i]) for i in indices)

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[float, ...], str]:
    example = int(self.indices[i])
    data, _, name = self.source[example]
    return data, tuple(self.pseudo_labels[example].tolist()), name


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureSource:
  """The examples of a labelled and a pseudo-labelled source. Thread-safe and picklable."""

  labelled: Source
  unlabelled: PseudoLabelledSource
  loss: str  # config.loss: a key of SMOOTH_TARGETS.
  label_smoothing: float  # Applied to the labels, not to the pseudo-labels.

  @property
  def label_names(self) -> tuple[str, ...]:
    """The names of the classes."""
    return self.labelled.label_names

  @property
  def classes(self) -> int:
    """The number of classes."""
    return self.labelled.classes

  @property
  def max_labels(self) -> int:
    """The width of a label: one probability per class."""
    return self.labelled.classes

  def __len__(self) -> int:
    return len(self.labelled) + len(self.unlabelled)

  def read_ahead(self, indices: Iterable[int]):
    """Begin to read examples that are needed soon."""
    ones, others = itertools.tee(indices)  # Sources that are not in object storage take none.
    n = len(self.labelled)
    self.labelled.read_ahead(i for i in ones if i < n)
    self.unlabelled.read_ahead(i - n for i in others if i >= n)

  def is_user_file(self, i: int) -> bool:
    """Return whether example `i` is a file of the user."""
    if i < len(self.labelled):
      return self.labelled.is_user_file(i)
    return self.unlabelled.is_user_file(i - len(self.labelled))

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, np.ndarray, str]:
    if i < len(self.labelled):
      data, labels, name = self.labelled[i]
      targets = np.zeros(self.classes, np.float32)
      targets[list(labels)] = 1
      return data, SMOOTH_TARGETS[self.loss](targets, self.label_smoothing), name
    data, probabilities, name = self.unlabelled[i - len(self.labelled)]
    return data, NORMALIZE_PROBABILITIES[self.loss](np.array(probabilities, np.float32)), name


def open_mixture(
  labelled: Source, data: DataConfig, *, seed: int, loss: str, smoothing: float
) -> MixtureSource:
  """Open the mixture that `data` describes.

  Raises UserError if `data.pseudo_labels` is empty, if the pseudo-labels do not exist yet, or if
  none is confident enough.
  """
  if not data.pseudo_labels:
    raise UserError(
      f'config.data.unlabelled={data.unlabelled!r} needs config.data.pseudo_labels; '
      'to make them, run: python -m vit_jax selftrain'
    )
  source = open_unlabelled(data.unlabelled, data.unlabelled_split, dir=data.dir)
  labels = read_pseudo_labels(Path(data.pseudo_labels), source, labelled.label_names)
  indices = select_balanced(
    labels.top_class,
    labels.confidence,
    classes=labelled.classes,
    threshold=data.confidence_threshold,
    count=data.unlabelled_per_class,
    seed=seed,
  )
  if not len(indices):
    raise UserError(
      f'config.data.confidence_threshold={data.confidence_threshold:g} excludes all '
      f'{len(source):,} images of {data.unlabelled}. The highest confidence of the teacher is '
      f'{labels.confidence.max():.3f}; lower the threshold or train the teacher for longer'
    )
  return MixtureSource(labelled, PseudoLabelledSource(source, labels, indices), loss, smoothing)
