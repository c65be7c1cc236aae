"""Few-shot linear evaluation of features (arXiv 2010.11929, §4.1).

Regularized least squares maps the features of a few examples of each class to targets of ±1, and is
solved exactly. What the paper leaves open is as in big_vision, by the same authors.

Shapes: n training examples, m test examples, d features, k classes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError

FEWSHOT_SHOTS = (1, 5, 10, 25)  # Examples of each class.
FEWSHOT_SEEDS = (0, 1, 2)
FEWSHOT_L2 = 1024.0  # 2^10, big_vision's default. The paper does not give its value.
_BIAS_FEATURE = 100.0  # A constant feature, so large that its weight is hardly regularized.


@dataclasses.dataclass(frozen=True, slots=True)
class FewShotResult:
  """The result for one sample of training examples."""

  shots: int
  seed: int
  accuracy: float
  predictions: np.ndarray  # [m]


def evaluate_fewshot(
  pool: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  *,
  label_names: Sequence[str],
  shots: Sequence[int] = FEWSHOT_SHOTS,
  seeds: Sequence[int] = FEWSHOT_SEEDS,
  l2: float = FEWSHOT_L2,
) -> list[FewShotResult]:
  """Return the result for each number of shots and each seed.

  Args:
    pool: Features [n, d] and labels [n] that training examples are sampled from.
    test: Features [m, d] and labels [m].
    label_names: The names of the k classes.
    shots: Numbers of training examples of each class.
    seeds: Seeds of the samples.
    l2: Weight of the regularization.

  Raises UserError if a class has fewer examples than the largest number of shots.
  """
  (features, labels), (test_features, test_labels) = pool, test
  _check_enough_examples(labels, label_names, max(shots))
  results = []
  for seed in seeds:
    by_class = shuffle_by_class(labels, len(label_names), seed)
    for count in shots:
      sample = np.concatenate([indices[:count] for indices in by_class])
      predictions = predict_ridge(
        features[sample], labels[sample], test_features, classes=len(label_names), l2=l2
      )
      accuracy = float(np.mean(predictions == test_labels))
      results.append(FewShotResult(count, seed, accuracy, predictions))
  return results


def feasible_shots(
  labels: np.ndarray, classes: int, shots: Sequence[int] = FEWSHOT_SHOTS
) -> tuple[int, ...]:
  """Return the numbers in `shots` for which every class has enough examples."""
  return tuple(count for count in shots if count <= np.bincount(labels, minlength=classes).min())


def _check_enough_examples(labels: np.ndarray, label_names: Sequence[str], shots: int):
  """Raise UserError if a class has fewer examples than `shots`."""
  counts = np.bincount(labels, minlength=len(label_names))
  if counts.min() < shots:
    name = label_names[int(counts.argmin())]
    raise UserError(
      f'{shots} shots: the class {name!r} has only {counts.min()} examples; use fewer shots'
    )


def shuffle_by_class(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
  """Return the shuffled indices of the examples of each class.

  The first `shots` of each are the sample, so that a larger sample contains the smaller ones.
  """
  rng = np.random.default_rng(seed)
  return [rng.permutation(np.flatnonzero(labels == class_)) for class_ in range(classes)]


def predict_ridge(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  *,
  classes: int,
  l2: float = FEWSHOT_L2,
) -> np.ndarray:
  """Fit features [n, d] to labels [n] and return the classes [m] of `test_features` [m, d]."""
  x, x_test = (
    np.pad(each, ((0, 0), (0, 1)), constant_values=_BIAS_FEATURE)  # [·, d + 1]
    for each in standardize(features, test_features, eps=1e-5)
  )
  weights = solve_ridge(x, 2 * np.eye(classes)[labels] - 1, l2)
  return (x_test @ weights).argmax(axis=1)


def standardize(
  features: np.ndarray, test_features: np.ndarray, *, eps: float
) -> tuple[np.ndarray, np.ndarray]:
  """Subtract the mean of `features` from both and divide by the standard deviation plus `eps`."""
  mean, std = mean_and_std(features, eps=eps)
  return (features - mean) / std, (test_features - mean) / std


def mean_and_std(features: np.ndarray, *, eps: float) -> tuple[np.ndarray, np.ndarray]:
  """Return the mean and the standard deviation plus `eps` of features [n, d], float64 [d] each."""
  return features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64) + eps


def solve_ridge(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
  """Return argmin_w |x w - y|² + l2 |w|², [d, k], of x [n, d] and y [n, k].

  Solves the smaller of the systems with xᵀx [d, d] and with x xᵀ [n, n].
  """
  n, d = x.shape
  if n >= d:
    return np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ y)
  return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), y)


def mean_and_std_by_shots(results: Sequence[FewShotResult]) -> dict[int, tuple[float, float]]:
  """Return {shots: (mean accuracy over seeds, standard deviation over seeds)}.

  The standard deviation of a single seed is 0.
  """
  accuracies = {}
  for result in results:
    accuracies.setdefault(result.shots, []).append(result.accuracy)
  return {
    shots: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    for shots, values in accuracies.items()
  }
