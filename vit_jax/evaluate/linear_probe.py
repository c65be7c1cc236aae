"""A linear probe: multinomial logistic regression on frozen, standardised features.

Its strength is the best of a sweep by the likelihood of held-out examples, in five-fold cross-validation on the pool.
Shapes: n examples, d features, k classes.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

_INVERSE_L2_GRID = tuple(
  10.0 ** (i / 2) for i in range(-8, 5)
)  # Inverse regularisation: 1e-4 … 100.
_CV_FOLDS = 5


def predict_linear_probe(
  x: np.ndarray,
  labels: np.ndarray,
  x_test: np.ndarray,
  *,
  classes: int,
  strengths: tuple[float, ...] = _INVERSE_L2_GRID,
) -> tuple[np.ndarray, float]:
  """Features [n, d] with labels [n] -> (the class [m] of each row of `x_test` [m, d], the strength that was chosen)."""
  mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + 1e-9
  x, x_test = (x - mean) / std, (x_test - mean) / std
  strength = (
    strengths[0] if len(strengths) == 1 else _select_inverse_l2(x, labels, classes, strengths)
  )
  weights = _fit_regularization_path(
    x, labels, classes, [each for each in strengths if each <= strength]
  )[-1]
  return _predict_log_probabilities(x_test, weights).argmax(axis=1), strength


def _select_inverse_l2(
  x: np.ndarray, labels: np.ndarray, classes: int, strengths: tuple[float, ...]
) -> float:
  """The strength with the largest mean log-likelihood of examples that were not learned from."""
  part, total = assign_folds(labels), np.zeros(len(strengths))
  for fold in range(_CV_FOLDS):
    held = part == fold
    for i, weights in enumerate(
      _fit_regularization_path(x[~held], labels[~held], classes, strengths)
    ):
      total[i] += np.take_along_axis(
        _predict_log_probabilities(x[held], weights), labels[held, None], axis=1
      ).mean()
  return strengths[int(total.argmax())]


def assign_folds(labels: np.ndarray) -> np.ndarray:
  """The fold [n] of each example: those of a class go round, so that every fold has its share of each."""
  out = np.empty(len(labels), int)
  turn = 0
  for class_ in np.unique(labels):
    of_class = np.flatnonzero(labels == class_)
    out[of_class] = (
      turn + np.arange(len(of_class))
    ) % _CV_FOLDS  # On from where the class before it stopped.
    turn += len(of_class)
  return out


def _fit_regularization_path(
  x: np.ndarray, labels: np.ndarray, classes: int, strengths
) -> list[np.ndarray]:
  """The weights [d + 1, k] for each strength, in rising order, each started from the one before it."""
  weights, out = np.zeros((x.shape[1] + 1, classes)), []
  for strength in strengths:
    weights = _fit_logistic_regression(x, labels, weights, strength)
    out.append(weights)
  return out


def _fit_logistic_regression(
  x: np.ndarray, labels: np.ndarray, weights: np.ndarray, strength: float
) -> np.ndarray:
  """argmin |w|² / 2 + strength · Σ cross-entropy, where the last row, the bias, is free."""
  targets = np.eye(weights.shape[1])[labels]  # [n, k]

  def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
    w = flat.reshape(weights.shape)
    logs = _predict_log_probabilities(x, w)
    off = strength * (np.exp(logs) - targets)  # [n, k]
    gradient = np.vstack([x.T @ off + w[:-1], off.sum(axis=0)])
    return (w[:-1] ** 2).sum() / 2 - strength * (targets * logs).sum(), gradient.ravel()

  options = {'maxiter': 2000, 'gtol': 1e-4 * max(1.0, strength), 'ftol': 1e-12}
  found = minimize(
    value_and_gradient, weights.ravel(), jac=True, method='L-BFGS-B', options=options
  )
  return found.x.reshape(weights.shape)


def _predict_log_probabilities(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[n, k]."""
  return log_softmax(x @ weights[:-1] + weights[-1], axis=1)
