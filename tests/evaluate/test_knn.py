"""Nearest-neighbour classification, against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.evaluate.test_fewshot import K, clusters
from vit_jax.errors import UserError
from vit_jax.evaluate.knn import predict_knn


@pytest.mark.parametrize('k', [1, 20, 210])
def test_predictions_are_those_of_scikit_learns_weighted_cosine_neighbours(k):
  # More test examples than a chunk has.
  (x, y), (x_test, y_test) = clusters(210, 24), clusters(1500, 24, seed=1)
  weights = lambda distance: np.exp(-distance / 0.07)
  theirs = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=weights).fit(
    x.astype(np.float64), y
  )
  predicted = predict_knn(x, y, x_test, classes=K, k=k)
  np.testing.assert_array_equal(predicted, theirs.predict(x_test.astype(np.float64)))
  assert np.mean(predicted == y_test) > 1.3 / K


def test_more_neighbours_than_examples_are_refused():
  x, y = clusters(10, 4)
  with pytest.raises(UserError, match='11 .* 10'):
    predict_knn(x, y, x, classes=K, k=11)
