"""Few-shot linear evaluation, against least squares in float64 and scikit-learn's ridge."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit_jax.errors import UserError
from vit_jax.evaluate.fewshot import (
  FewShotResult,
  evaluate_fewshot,
  feasible_shots,
  mean_and_std_by_shots,
  predict_ridge,
  shuffle_by_class,
  solve_ridge,
)

K, M = 7, 300


def clusters(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Return float32 features [n, d] around the centres of classes that overlap, and labels."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(n) % K)
  centres = np.random.default_rng(99).normal(size=(K, d))
  return (0.3 * centres[labels] + rng.normal(scale=0.5, size=(n, d)) + 3).astype(np.float32), labels


def whitened(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  x, x_test = x.astype(np.float64), x_test.astype(np.float64)
  mean, std = np.array([x.mean(0), x.std(0)])
  return tuple(
    np.hstack([(each - mean) / (std + 1e-5), np.full((len(each), 1), 100.0)])
    for each in (x, x_test)
  )


@pytest.mark.parametrize(
  ('n', 'd'), [(35, 64), (70, 64), (175, 20), (65, 64)], ids=['N < d', 'N > d', 'N >> d', 'N = d']
)
@pytest.mark.parametrize('l2', [1e-2, 1.0, 1024.0])
def test_predictions_are_those_of_a_float64_solve_and_of_scikit_learns_ridge(n, d, l2):
  (x, y), (x_test, y_test) = clusters(n, d), clusters(M, d, seed=1)
  predicted = predict_ridge(x, y, x_test, classes=K, l2=l2)
  a, b = whitened(x, x_test)
  targets = np.where(np.arange(K) == y[:, None], 1.0, -1.0)
  # |x w - y|² + λ |w|² is the plain least squares of rows of √λ appended.
  solved = np.linalg.lstsq(
    np.vstack([a, np.sqrt(l2) * np.eye(d + 1)]), np.vstack([targets, np.zeros((d + 1, K))])
  )[0]
  np.testing.assert_array_equal(predicted, (b @ solved).argmax(axis=1))
  np.testing.assert_array_equal(
    predicted, Ridge(alpha=l2, fit_intercept=False).fit(a, targets).predict(b).argmax(axis=1)
  )
  np.testing.assert_allclose(solve_ridge(a, targets, l2), solved, rtol=1e-6, atol=1e-9)
  assert l2 < 1024 or np.mean(predicted == y_test) > 2 / K


def test_results_are_predict_ridge_on_the_first_shots_of_each_class():
  pool, test = clusters(7 * 30, 16), clusters(M, 16, seed=1)
  results = evaluate_fewshot(pool, test, label_names='abcdefg', shots=(1, 5, 25), seeds=(0, 3))
  assert [(each.shots, each.seed) for each in results] == [
    (s, seed) for seed in (0, 3) for s in (1, 5, 25)
  ]
  for each in results:
    chosen = np.concatenate(
      [order[: each.shots] for order in shuffle_by_class(pool[1], K, each.seed)]
    )
    np.testing.assert_array_equal(np.bincount(pool[1][chosen]), [each.shots] * K)
    np.testing.assert_array_equal(
      each.predictions, predict_ridge(pool[0][chosen], pool[1][chosen], test[0], classes=K)
    )
    assert each.accuracy == np.mean(each.predictions == test[1])
  assert results[2].accuracy > results[0].accuracy


def test_a_seed_determines_the_shuffle_of_each_class():
  labels = clusters(210, 4)[1]
  for again, order in zip(
    shuffle_by_class(labels, K, 1), shuffle_by_class(labels, K, 1), strict=True
  ):
    np.testing.assert_array_equal(again, order)
    assert len(set(order)) == 30
  assert any(
    (a != b).any()
    for a, b in zip(shuffle_by_class(labels, K, 0), shuffle_by_class(labels, K, 1), strict=True)
  )


def test_a_class_with_too_few_examples_is_named():
  x, y = clusters(70, 4)
  keep = np.flatnonzero(y != 2)
  keep = np.concatenate([keep, np.flatnonzero(y == 2)[:4]])
  assert feasible_shots(y[keep], K) == (1,)
  with pytest.raises(UserError, match="5 shots.*'c'.* 4 "):
    evaluate_fewshot((x[keep], y[keep]), (x, y), label_names='abcdefg', shots=(1, 5))


def test_mean_and_standard_deviation_are_over_seeds():
  made = [
    FewShotResult(s, seed, a, np.zeros(1))
    for s, seed, a in [(1, 0, 0.2), (5, 0, 0.5), (1, 1, 0.4), (5, 1, 0.5)]
  ]
  assert mean_and_std_by_shots(made) == {
    1: (pytest.approx(0.3), pytest.approx(np.sqrt(0.02))),
    5: (0.5, 0.0),
  }
