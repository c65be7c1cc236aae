"""The nearest neighbours' vote on frozen features by cosine similarity, weighted: arXiv 1805.01978; k is DINO's, 2104.14294."""

import numpy as np

from vit_jax.errors import UserError

KNN_NEIGHBORS = 20
_KNN_TEMPERATURE = 0.07
_KNN_CHUNK_ROWS = 1024  # Of the test features at a time: [ROWS, n] similarities are held.


def predict_knn(
  x: np.ndarray,
  labels: np.ndarray,
  x_test: np.ndarray,
  *,
  classes: int,
  k: int = KNN_NEIGHBORS,
  temperature: float = _KNN_TEMPERATURE,
) -> np.ndarray:
  """Features [n, d] with labels [n] -> the class [m] of each row of `x_test` [m, d].

  Each of the `k` nearest votes for its class with exp(similarity / temperature). UserError where there are not so many.
  """
  if not 1 <= k <= len(x):
    raise UserError(
      f'{k} nearest neighbours of {len(x)} examples: expected a number from 1 to {len(x)}'
    )
  x, x_test = _normalize_rows(x), _normalize_rows(x_test)
  parts = [
    _vote_neighbors(x_test[i : i + _KNN_CHUNK_ROWS] @ x.T, labels, classes, k, temperature)
    for i in range(0, len(x_test), _KNN_CHUNK_ROWS)
  ]
  return np.concatenate(parts)


def _normalize_rows(x: np.ndarray) -> np.ndarray:
  """Rows of length 1; those of zeros stay."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _vote_neighbors(
  similarity: np.ndarray, labels: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
  """Similarities [m, n] to examples with labels [n] -> classes [m]."""
  nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [m, k]
  weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / temperature)
  votes = np.zeros((len(similarity), classes))
  np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
  return votes.argmax(axis=1)
