"""Few-shot linear evaluation of a representation, as the paper does it (arXiv 2010.11929, §4.1): regularised least squares from
a few examples of each class onto targets of ±1, solved exactly. What the paper leaves open is as in its authors' big_vision.

Shapes: n examples, m of them to be judged, d features, k classes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError

FEWSHOT_SHOTS = (1, 5, 10, 25)  # Examples of each class.
FEWSHOT_SEEDS = (0, 1, 2)
FEWSHOT_L2 = 1024.0  # 2^10; the paper does not say which it took.
_BIAS_FEATURE = (
  100.0  # A feature that is the same everywhere, and so large that its weight is hardly held down.
)


@dataclasses.dataclass(frozen=True, slots=True)
class FewShotResult:
  """Of one draw of examples: the share that is right, and what was said of each."""

  shots: int
  seed: int
  accuracy: float
  predicted: np.ndarray  # [m]


def evaluate_fewshot(
  pool: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  *,
  names: Sequence[str],
  shots: Sequence[int] = FEWSHOT_SHOTS,
  seeds: Sequence[int] = FEWSHOT_SEEDS,
  l2: float = FEWSHOT_L2,
) -> list[FewShotResult]:
  """(features [n, d], labels [n]) to draw from, (features [m, d], labels [m]) to judge -> a result for each of shots and seeds.

  `names`: of the k classes. UserError where one of them has fewer examples than the largest of `shots`.
  """
  (x, y), (x_test, y_test) = pool, test
  _check_enough_examples(y, names, max(shots))
  results = []
  for seed in seeds:
    order = shuffle_by_class(y, len(names), seed)
    for count in shots:
      chosen = np.concatenate([each[:count] for each in order])
      predicted = predict_ridge(x[chosen], y[chosen], x_test, classes=len(names), l2=l2)
      results.append(FewShotResult(count, seed, float(np.mean(predicted == y_test)), predicted))
  return results


def feasible_shots(
  labels: np.ndarray, classes: int, shots: Sequence[int] = FEWSHOT_SHOTS
) -> tuple[int, ...]:
  """Those of `shots` of which every class has as many examples."""
  return tuple(count for count in shots if count <= np.bincount(labels, minlength=classes).min())


def _check_enough_examples(labels: np.ndarray, names: Sequence[str], shots: int):
  """UserError where a class has fewer examples than `shots`."""
  has = np.bincount(labels, minlength=len(names))
  if has.min() < shots:
    name = names[int(has.argmin())]
    raise UserError(
      f'{shots} shots: the class {name!r} has {has.min()} examples to draw from; ask for fewer'
    )


def shuffle_by_class(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
  """The examples of each class in the order in which they are taken, so that more shots are the fewer and some besides."""
  rng = np.random.default_rng(seed)
  return [rng.permutation(np.flatnonzero(labels == class_)) for class_ in range(classes)]


def predict_ridge(
  x: np.ndarray, labels: np.ndarray, x_test: np.ndarray, *, classes: int, l2: float = FEWSHOT_L2
) -> np.ndarray:
  """Features [n, d] with labels [n] -> the class [m] of each row of `x_test` [m, d]."""
  mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + 1e-5
  whiten = lambda x: np.pad(
    (x - mean) / std, ((0, 0), (0, 1)), constant_values=_BIAS_FEATURE
  )  # [·, d + 1]
  weights = solve_ridge(whiten(x), 2 * np.eye(classes)[labels] - 1, l2)
  return (whiten(x_test) @ weights).argmax(axis=1)


def solve_ridge(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
  """argmin |x w - y|² + l2 |w|² [d, k] of x [n, d] and y [n, k]; through the smaller of xᵀx and xxᵀ."""
  n, d = x.shape
  if n >= d:
    return np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ y)
  return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), y)


def mean_and_std_by_shots(results: Sequence[FewShotResult]) -> dict[int, tuple[float, float]]:
  """{shots: (the mean accuracy over the seeds, its standard deviation from seed to seed)}."""
  by_shots = {}
  for each in results:
    by_shots.setdefault(each.shots, []).append(each.accuracy)
  spread = lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return {count: (float(np.mean(values)), spread(values)) for count, values in by_shots.items()}
