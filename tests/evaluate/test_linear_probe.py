"""The linear probe, against scikit-learn's logistic regression and its grid search."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from tests.evaluate.test_fewshot import K, clusters
from vit_jax.evaluate.linear_probe import assign_folds, fit_linear_probe

INVERSE_L2S = (1e-3, 1e-2, 1e-1, 1.0)


def standardised(x: np.ndarray, x_test: np.ndarray) -> list[np.ndarray]:
  x, x_test = x.astype(np.float64), x_test.astype(np.float64)
  return [(each - x.mean(0)) / x.std(0) for each in (x, x_test)]


@pytest.mark.parametrize('inverse_l2', [1e-4, 1e-2, 1.0])
def test_predictions_are_those_of_scikit_learns_logistic_regression(inverse_l2):
  (x, y), (x_test, y_test) = clusters(140, 12), clusters(300, 12, seed=1)
  probe = fit_linear_probe(x, y, classes=K, inverse_l2s=(inverse_l2,))
  predicted = probe.predict(x_test)
  a, b = standardised(x, x_test)
  theirs = LogisticRegression(C=inverse_l2, max_iter=5000, tol=1e-8).fit(a, y).predict(b)
  assert np.mean(predicted == theirs) >= 0.99  # Of 300. Both solvers stop at a small gradient.
  assert probe.inverse_l2 == inverse_l2
  assert np.mean(predicted == y_test) > 1.5 / K


def test_the_regularization_is_that_of_a_grid_search_over_the_same_folds():
  (x, y), (x_test, _) = clusters(140, 12), clusters(300, 12, seed=1)
  a, _ = standardised(x, x_test)
  search = GridSearchCV(
    LogisticRegression(max_iter=5000, tol=1e-8),
    {'C': INVERSE_L2S},
    cv=PredefinedSplit(assign_folds(y)),
    scoring='neg_log_loss',
  )
  selected = fit_linear_probe(x, y, classes=K, inverse_l2s=INVERSE_L2S).inverse_l2
  assert selected == search.fit(a, y).best_params_['C']


def test_fewer_examples_than_folds_are_held_out_one_by_one():
  (x, y), (x_test, _) = clusters(3, 12), clusters(5, 12, seed=1)
  y = np.array([0, 1, 1])
  probe = fit_linear_probe(x[:3], y, classes=2, inverse_l2s=(1e-3, 1e-1))
  assert np.isfinite(probe.kernel).all() and set(probe.predict(x_test)) <= {0, 1}


def test_every_class_is_spread_evenly_over_the_folds():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [5, 10, 13, 22]))
  part = assign_folds(labels)
  assert np.ptp(np.bincount(part)) <= 1
  for class_ in range(4):
    assert np.ptp(np.bincount(part[labels == class_], minlength=5)) <= 1
