"""Protocols that judge frozen features: each says, by name, which share of a test split is right after learning from a pool."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import fewshot, knn, linear
from vit_jax.evaluate.subject import Subject

# Where the pool is not the source's split 'train', or the test split not its held-out one (big_vision's common_fewshot.py).
# ImageNet's first 65,000 have at least 30 of each class.
SPLITS = {
  'tfds:imagenet2012': ('train[:65000]', 'validation'),
  'tfds:uc_merced': ('train[:1000]', 'train[1000:]'),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """What the protocols leave open."""

  shots: tuple[int, ...] = ()  # () means those of fewshot.SHOTS for which every class has enough.
  seeds: tuple[int, ...] = fewshot.SEEDS
  l2: float = fewshot.L2
  k: int = knn.K


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
  """The share of a test split that is right, and what is to be said of it."""

  accuracy: float
  std: float | None = None  # From seed to seed.
  note: str = ''


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Features:
  """Of a pool and a test split of `names` classes."""

  x: np.ndarray  # [n, d]
  labels: np.ndarray  # [n]
  x_test: np.ndarray  # [m, d]
  test_labels: np.ndarray  # [m]
  names: Sequence[str]

  def right(self, predicted: np.ndarray) -> float:
    """The share of the test split that is."""
    return float(np.mean(predicted == self.test_labels))


def by_fewshot(f: Features, options: Options) -> dict[str, Figure]:
  """{'5shot': …}; none where a class has no example."""
  shots = options.shots or fewshot.possible(f.labels, len(f.names))
  if not shots:
    return {}
  pool, test = (f.x, f.labels), (f.x_test, f.test_labels)
  results = fewshot.fewshot(
    pool, test, names=f.names, shots=shots, seeds=options.seeds, l2=options.l2
  )
  return {f'{count}shot': Figure(*figures) for count, figures in fewshot.summary(results).items()}


def by_knn(f: Features, options: Options) -> dict[str, Figure]:
  """{'20nn': …}."""
  return {
    f'{options.k}nn': Figure(
      f.right(knn.knn(f.x, f.labels, f.x_test, classes=len(f.names), k=options.k))
    )
  }


def by_linear(f: Features, options: Options) -> dict[str, Figure]:
  """{'linear': …}."""
  predicted, strength = linear.linear_probe(f.x, f.labels, f.x_test, classes=len(f.names))
  return {'linear': Figure(f.right(predicted), note=f'C {strength:g}')}


PROTOCOLS: dict[str, Callable[[Features, Options], dict[str, Figure]]] = {
  'fewshot': by_fewshot,
  'knn': by_knn,
  'linear': by_linear,
}


def pool_and_test(
  name: str, *, split: str = '', test_split: str = '', dir: str = ''
) -> tuple[Source, Source]:
  """The examples to learn from and those to judge. UserError where they have several labels, or other classes."""
  known = SPLITS.get(name, ('train', ''))
  pool = open_source(name, split or known[0], dir=dir)
  test = open_source(name, test_split or known[1], dir=dir)
  for source in (pool, test):
    if source.most_labels > 1:
      raise UserError(
        f'{name}: its examples have up to {source.most_labels} labels, and frozen features are judged by one'
      )
  return pool, test


def features(subject: Subject, params: dict, pool: Source, test: Source) -> Features:
  """Of all examples that can be read and have a label."""
  (x, labels), (x_test, test_labels) = (
    labelled(*subject.features(params, source)) for source in (pool, test)
  )
  return Features(
    x=x, labels=labels, x_test=x_test, test_labels=test_labels, names=pool.label_names
  )


def labelled(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, d], labels [n]) of those whose label [n, 1] is not -1."""
  known = labels[:, 0] >= 0
  return x[known], labels[known, 0]
