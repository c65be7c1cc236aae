"""Weighted nearest-neighbour classification of frozen features by cosine similarity.

The method is that of arXiv 1805.01978, with the k of DINO (arXiv 2104.14294).

Shapes: n training examples, m test examples, d features, k neighbours.
"""

import numpy as np

from vit_jax.errors import UserError

KNN_NEIGHBORS = 20
_KNN_TEMPERATURE = 0.07
_KNN_CHUNK_ROWS = 1024  # Test examples at a time: [_KNN_CHUNK_ROWS, n] similarities are in memory.


def predict_knn(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  *,
  classes: int,
  k: int = KNN_NEIGHBORS,
  temperature: float = _KNN_TEMPERATURE,
) -> np.ndarray:
  """Return the classes [m] of `test_features` [m, d], given features [n, d] with labels [n].

  Each of the `k` nearest neighbours votes for its class with weight exp(similarity / temperature).
  Raises UserError if `k` is not between 1 and n.
  """
  if not 1 <= k <= len(features):
    raise UserError(
      f'{k} nearest neighbours of {len(features)} examples: '
      f'expected a number from 1 to {len(features)}'
    )
  x, x_test = _normalize_rows(features), _normalize_rows(test_features)
  chunks = [x_test[i : i + _KNN_CHUNK_ROWS] for i in range(0, len(x_test), _KNN_CHUNK_ROWS)]
  votes = [_count_votes(chunk @ x.T, labels, classes, k, temperature) for chunk in chunks]
  return np.concatenate([each.argmax(axis=1) for each in votes])


def _normalize_rows(x: np.ndarray) -> np.ndarray:
  """Divide each row by its norm. Rows of zeros stay zero."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _count_votes(
  similarity: np.ndarray, labels: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
  """Return the weighted votes [m, classes] of similarities [m, n] to examples with labels [n]."""
  nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [m, k]
  weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / temperature)
  votes = np.zeros((len(similarity), classes))
  np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
  return votes
