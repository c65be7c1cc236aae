"""Probes: how well frozen features classify a test split, given labelled examples of a pool.

Shapes: n examples, d features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import fewshot, knn, linear_probe
from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.evaluate.outputs import FEATURES

# The splits (pool, test) that differ from 'train' and the held-out split of the source. They are
# those of big_vision's common_fewshot.py. ImageNet's first 65,000 have at least 30 of each class.
PROBE_SPLITS = {
  'tfds:imagenet2012': ('train[:65000]', 'validation'),
  'tfds:uc_merced': ('train[:1000]', 'train[1000:]'),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
  """Options of the probes."""

  shots: tuple[
    int, ...
  ] = ()  # () selects those of `FEWSHOT_SHOTS` that every class has enough for.
  seeds: tuple[int, ...] = fewshot.FEWSHOT_SEEDS
  l2: float = fewshot.FEWSHOT_L2
  k: int = knn.KNN_NEIGHBORS


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
  """The accuracy on a test split."""

  accuracy: float
  std: float | None = None  # Standard deviation over seeds.
  note: str = ''


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFeatures:
  """Features and labels of a pool of examples and of a test split."""

  train_features: np.ndarray  # [n, d]
  train_labels: np.ndarray  # [n]
  test_features: np.ndarray  # [n, d]
  test_labels: np.ndarray  # [n]
  label_names: Sequence[str]

  def accuracy_of(self, predictions: np.ndarray) -> float:
    """Return the accuracy of predictions [n] for the test split."""
    return float(np.mean(predictions == self.test_labels))


def _probe_fewshot(features: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """Return {'5shot': score, …}; {} if a class has no example."""
  classes = len(features.label_names)
  shots = options.shots or fewshot.feasible_shots(features.train_labels, classes)
  if not shots:
    return {}
  results = fewshot.evaluate_fewshot(
    (features.train_features, features.train_labels),
    (features.test_features, features.test_labels),
    label_names=features.label_names,
    shots=shots,
    seeds=options.seeds,
    l2=options.l2,
  )
  summary = fewshot.mean_and_std_by_shots(results)
  return {f'{count}shot': Score(mean, std) for count, (mean, std) in summary.items()}


def _probe_knn(features: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """Return {'20nn': score}."""
  predictions = knn.predict_knn(
    features.train_features,
    features.train_labels,
    features.test_features,
    classes=len(features.label_names),
    k=options.k,
  )
  return {f'{options.k}nn': Score(features.accuracy_of(predictions))}


def _probe_linear(features: ProbeFeatures, options: ProbeOptions) -> dict[str, Score]:
  """Return {'linear': score}."""
  del options
  probe = linear_probe.fit_linear_probe(
    features.train_features, features.train_labels, classes=len(features.label_names)
  )
  accuracy = features.accuracy_of(probe.predict(features.test_features))
  return {'linear': Score(accuracy, note=f'C {probe.inverse_l2:g}')}


PROBES: dict[str, Callable[[ProbeFeatures, ProbeOptions], dict[str, Score]]] = {
  'fewshot': _probe_fewshot,
  'knn': _probe_knn,
  'linear': _probe_linear,
}


def open_pool_and_test(
  name: str, *, split: str = '', test_split: str = '', dir: str = ''
) -> tuple[Source, Source]:
  """Open the labelled pool and the test split of a source.

  Raises UserError if the data are missing, or if examples have several labels.
  """
  pool_split, default_test_split = PROBE_SPLITS.get(name, ('train', ''))
  pool = open_source(name, split or pool_split, dir=dir)
  test = open_source(name, test_split or default_test_split, dir=dir)
  check_one_label(name, pool, test)
  return pool, test


def check_one_label(name: str, *sources: Source):
  """Raise UserError if an example of a source has several labels. `name` is the source's."""
  for source in sources:
    if source.max_labels > 1:
      raise UserError(
        f'{name}: its examples have up to {source.max_labels} labels, and probes need exactly one'
      )


def extract_probe_features(
  evaluator: Evaluator, params: dict, pool: Source, test: Source | None
) -> ProbeFeatures:
  """Compute the features of all examples that can be read and have a label.

  Without `test` there are no test features.
  """
  train_features, train_labels = _extract_labelled(evaluator, params, pool)
  test_features, test_labels = train_features[:0], train_labels[:0]
  if test is not None:
    test_features, test_labels = _extract_labelled(evaluator, params, test)
  return ProbeFeatures(
    train_features=train_features,
    train_labels=train_labels,
    test_features=test_features,
    test_labels=test_labels,
    label_names=pool.label_names,
  )


def _extract_labelled(
  evaluator: Evaluator, params: dict, source: Source
) -> tuple[np.ndarray, np.ndarray]:
  """Return (features [n, d], labels [n]) of the examples that can be read and have a label."""
  rows = evaluator.rows(params, source, FEATURES)
  used = rows['mask'] & (rows['label'][:, 0] >= 0)
  return rows['features'][used], rows['label'][used, 0]
