"""A linear probe: multinomial logistic regression on frozen, standardized features.

The regularization is chosen from a grid by the log-likelihood of held-out examples, in five-fold
cross-validation on the training examples.

Shapes: n training examples, m test examples, d features, k classes.
"""

import dataclasses

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

from vit_jax.evaluate.fewshot import mean_and_std

_INVERSE_L2_GRID = tuple(10.0 ** (i / 2) for i in range(-8, 5))  # 1e-4 … 100.
_CV_FOLDS = 5
_MIN_SIZE_FOR_THREADS = 10_000_000  # Multiplications in the product of features and weights.


@dataclasses.dataclass(frozen=True, slots=True)
class LinearProbe:
  """A fitted probe. Its kernel and bias apply to features that are not standardized."""

  kernel: np.ndarray  # [d, k]
  bias: np.ndarray  # [k]
  inverse_l2: float  # The inverse regularization strength that was selected.

  def predict(self, features: np.ndarray) -> np.ndarray:
    """Return the most probable class [m] of each of the features [m, d]."""
    return (features @ self.kernel + self.bias).argmax(axis=1)


def fit_linear_probe(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  classes: int,
  inverse_l2s: tuple[float, ...] = _INVERSE_L2_GRID,
) -> LinearProbe:
  """Fit a probe to features [n, d] and labels [n].

  `inverse_l2s` is the grid of inverse regularization strengths, in ascending order.
  """
  mean, std = mean_and_std(features, eps=1e-9)
  x, best = (features - mean) / std, inverse_l2s[0]
  if len(inverse_l2s) > 1:
    best = _select_inverse_l2(x, labels, classes, inverse_l2s)
  grid = [each for each in inverse_l2s if each <= best]
  weights = _fit_regularization_path(x, labels, classes, grid)[-1]
  kernel = weights[:-1] / std[:, None]
  return LinearProbe(kernel, weights[-1] - mean @ kernel, best)


def _select_inverse_l2(
  x: np.ndarray, labels: np.ndarray, classes: int, inverse_l2s: tuple[float, ...]
) -> float:
  """Return the value with the largest mean log-likelihood of held-out examples."""
  fold_of, total = assign_folds(labels), np.zeros(len(inverse_l2s))
  for fold in np.unique(fold_of):  # Fewer than five examples fill fewer folds.
    held_out = fold_of == fold
    path = _fit_regularization_path(x[~held_out], labels[~held_out], classes, inverse_l2s)
    for i, weights in enumerate(path):
      log_probabilities = _predict_log_probabilities(x[held_out], weights)
      total[i] += np.take_along_axis(log_probabilities, labels[held_out, None], axis=1).mean()
  return inverse_l2s[int(total.argmax())]


def assign_folds(labels: np.ndarray) -> np.ndarray:
  """Return the fold [n] of each example. The examples of each class are spread over all folds."""
  folds = np.empty(len(labels), int)
  start = 0
  for class_ in np.unique(labels):
    members = np.flatnonzero(labels == class_)
    # Start where the previous class ended, so that the folds have equal sizes.
    folds[members] = (start + np.arange(len(members))) % _CV_FOLDS
    start += len(members)
  return folds


def _fit_regularization_path(
  x: np.ndarray, labels: np.ndarray, classes: int, inverse_l2s
) -> list[np.ndarray]:
  """Return the weights [d + 1, k] for each inverse L2, each fit starting from the previous one."""
  weights, path = np.zeros((x.shape[1] + 1, classes)), []
  # Threads that wait for one another cost more than they save where the products are small.
  threads = None if x.size * classes > _MIN_SIZE_FOR_THREADS else 1
  with threadpool_limits(threads, user_api='blas'):
    for inverse_l2 in inverse_l2s:
      weights = _fit_logistic_regression(x, labels, weights, inverse_l2)
      path.append(weights)
  return path


def _fit_logistic_regression(
  x: np.ndarray, labels: np.ndarray, weights: np.ndarray, inverse_l2: float
) -> np.ndarray:
  """Return argmin_w |w|² / 2 + inverse_l2 · Σ cross-entropy. The last row, the bias, is free."""
  targets = np.eye(weights.shape[1])[labels]  # [n, k]

  def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
    w = flat.reshape(weights.shape)
    log_probabilities = _predict_log_probabilities(x, w)
    error = inverse_l2 * (np.exp(log_probabilities) - targets)  # [n, k]
    gradient = np.vstack([x.T @ error + w[:-1], error.sum(axis=0)])
    value = (w[:-1] ** 2).sum() / 2 - inverse_l2 * (targets * log_probabilities).sum()
    return value, gradient.ravel()

  options = {'maxiter': 2000, 'gtol': 1e-4 * max(1.0, inverse_l2), 'ftol': 1e-12}
  result = minimize(
    value_and_gradient, weights.ravel(), jac=True, method='L-BFGS-B', options=options
  )
  return result.x.reshape(weights.shape)


def _predict_log_probabilities(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Return the log-probabilities [n, k] of features [n, d], with weights [d + 1, k]."""
  return log_softmax(x @ weights[:-1] + weights[-1], axis=1)
