"""Protocols that judge frozen features: each says, by name, which share of a test split is right after learning from a pool."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import fewshot, knn, linear_probe
from vit_jax.evaluate.evaluator import Evaluator

# Where the pool is not the source's split 'train', or the test split not its held-out one (big_vision's common_fewshot.py).
# ImageNet's first 65,000 have at least 30 of each class.
PROBE_SPLITS = {
  'tfds:imagenet2012': ('train[:65000]', 'validation'),
  'tfds:uc_merced': ('train[:1000]', 'train[1000:]'),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
  """What the protocols leave open."""

  shots: tuple[int, ...] = ()  # () means those of fewshot.SHOTS for which every class has enough.
  seeds: tuple[int, ...] = fewshot.FEWSHOT_SEEDS
  l2: float = fewshot.FEWSHOT_L2
  k: int = knn.KNN_NEIGHBORS


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
  """The share of a test split that is right, and what is to be said of it."""

  accuracy: float
  std: float | None = None  # From seed to seed.
  note: str = ''


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFeatures:
  """Of a pool and a test split of `names` classes."""

  x: np.ndarray  # [n, d]
  labels: np.ndarray  # [n]
  x_test: np.ndarray  # [m, d]
  test_labels: np.ndarray  # [m]
  names: Sequence[str]

  def right(self, predicted: np.ndarray) -> float:
    """The share of the test split that is."""
    return float(np.mean(predicted == self.test_labels))


def _probe_fewshot(f: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """{'5shot': …}; none where a class has no example."""
  shots = options.shots or fewshot.feasible_shots(f.labels, len(f.names))
  if not shots:
    return {}
  pool, test = (f.x, f.labels), (f.x_test, f.test_labels)
  results = fewshot.evaluate_fewshot(
    pool, test, names=f.names, shots=shots, seeds=options.seeds, l2=options.l2
  )
  return {
    f'{count}shot': Score(*figures)
    for count, figures in fewshot.mean_and_std_by_shots(results).items()
  }


def _probe_knn(f: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """{'20nn': …}."""
  return {
    f'{options.k}nn': Score(
      f.right(knn.predict_knn(f.x, f.labels, f.x_test, classes=len(f.names), k=options.k))
    )
  }


def _probe_linear(f: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """{'linear': …}."""
  predicted, strength = linear_probe.predict_linear_probe(
    f.x, f.labels, f.x_test, classes=len(f.names)
  )
  return {'linear': Score(f.right(predicted), note=f'C {strength:g}')}


PROBES: dict[str, Callable[[ProbeFeatures, ProbeOptions], dict[str, Score]]] = {
  'fewshot': _probe_fewshot,
  'knn': _probe_knn,
  'linear': _probe_linear,
}


def open_pool_and_test(
  name: str, *, split: str = '', test_split: str = '', dir: str = ''
) -> tuple[Source, Source]:
  """The examples to learn from and those to judge. UserError where they have several labels, or other classes."""
  known = PROBE_SPLITS.get(name, ('train', ''))
  pool = open_source(name, split or known[0], dir=dir)
  test = open_source(name, test_split or known[1], dir=dir)
  for source in (pool, test):
    if source.max_labels > 1:
      raise UserError(
        f'{name}: its examples have up to {source.max_labels} labels, and frozen features are judged by one'
      )
  return pool, test


def extract_probe_features(
  subject: Evaluator, params: dict, pool: Source, test: Source
) -> ProbeFeatures:
  """Of all examples that can be read and have a label."""
  (x, labels), (x_test, test_labels) = (
    _drop_unlabelled(*subject.features(params, source)) for source in (pool, test)
  )
  return ProbeFeatures(
    x=x, labels=labels, x_test=x_test, test_labels=test_labels, names=pool.label_names
  )


def _drop_unlabelled(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, d], labels [n]) of those whose label [n, 1] is not -1."""
  known = labels[:, 0] >= 0
  return x[known], labels[known, 0]
