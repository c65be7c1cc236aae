"""Labelled and pseudo-labelled examples as one source, the labelled ones first; a label is the probability of each class.

Which of them a batch has is loader.py's to say. Shapes: k classes.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.pseudo import PseudoLabels, read_pseudo_labels, select_balanced
from vit_jax.data.sources import Source
from vit_jax.data.unlabelled import open_unlabelled
from vit_jax.errors import UserError

# What `losses.py` makes of ones and zeros [k] before it compares them: loss -> (targets, smoothing) -> targets.
SMOOTH_TARGETS = {
  'softmax': lambda t, s: (1 - s) * t / max(t.sum(), 1) + s / len(t),
  'sigmoid': lambda t, s: s + (1 - 2 * s) * t,
}
# What it is given of a teacher's probabilities, whose rounded sum is not quite 1.
NORMALIZE_PROBABILITIES = {'softmax': lambda p: p / p.sum(), 'sigmoid': lambda p: p}


@dataclasses.dataclass(frozen=True, slots=True)
class PseudoLabelledSource:
  """Chosen examples of a source, with the probability of each class in place of labels."""

  source: Source
  labels: PseudoLabels
  chosen: np.ndarray  # Numbers of examples of the source, some of them several times.

  def listing(self) -> str:
    """A digest of the source, of what was said of it, and of the choice."""
    facts = (self.source.listing(), self.labels.digest)
    return hashlib.blake2b(
      repr(facts).encode() + self.chosen.astype('<i8').tobytes(), digest_size=8
    ).hexdigest()

  def spread(self, n: int) -> 'PseudoLabelledSource':
    """`n` of them (all, if there are fewer), evenly spaced."""
    return dataclasses.replace(
      self, chosen=self.chosen[np.linspace(0, len(self) - 1, min(n, len(self))).astype(np.int64)]
    )

  def __len__(self) -> int:
    return len(self.chosen)

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[float, ...], str]:
    example = int(self.chosen[i])
    data, _, name = self.source[example]
    return data, tuple(self.labels[example].tolist()), name


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureSource:
  """The examples of two sources; may be read from several threads at once, and pickled."""

  labelled: Source
  unlabelled: PseudoLabelledSource
  loss: str  # config.loss, which says what a target is.
  smoothing: float  # Of the labels; what a teacher said stays as it is.

  @property
  def label_names(self) -> tuple[str, ...]:
    return self.labelled.label_names

  @property
  def classes(self) -> int:
    return self.labelled.classes

  @property
  def most_labels(self) -> int:
    """Each class has a probability."""
    return self.labelled.classes

  def __len__(self) -> int:
    return len(self.labelled) + len(self.unlabelled)

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, np.ndarray, str]:
    if i < len(self.labelled):
      data, labels, name = self.labelled[i]
      hot = np.zeros(self.classes, np.float32)
      hot[list(labels)] = 1
      return data, SMOOTH_TARGETS[self.loss](hot, self.smoothing), name
    data, probabilities, name = self.unlabelled[i - len(self.labelled)]
    return data, NORMALIZE_PROBABILITIES[self.loss](np.array(probabilities, np.float32)), name


def open_mixture(
  labelled: Source, data: DataConfig, *, seed: int, loss: str, smoothing: float
) -> MixtureSource:
  """The mixture that `data` describes. UserError where there are no labels yet, or none that the teacher is sure enough of."""
  if not data.pseudo_labels:
    need = 'config.data.pseudo_labels, which say what they are'
    raise UserError(
      f'config.data.unlabelled={data.unlabelled!r} needs {need}: `python -m vit_jax selftrain` makes them'
    )
  source = open_unlabelled(data.unlabelled, data.unlabelled_split, dir=data.dir)
  labels = read_pseudo_labels(Path(data.pseudo_labels), source, labelled.label_names)
  choice = {
    'classes': labelled.classes,
    'least': data.confidence_threshold,
    'count': data.unlabelled_per_class,
    'seed': seed,
  }
  chosen = select_balanced(labels.best, labels.confidence, **choice)
  if not len(chosen):
    surest = f'it is at most {labels.confidence.max():.3f}'
    raise UserError(
      f'config.data.confidence_threshold={data.confidence_threshold:g}: the teacher is so sure of none of the {len(source):,} images of '
      f'{data.unlabelled} ({surest}); lower it, or train the teacher for longer'
    )
  return MixtureSource(labelled, PseudoLabelledSource(source, labels, chosen), loss, smoothing)
