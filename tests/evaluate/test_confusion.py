"""Confusion matrices, and pictures of them that can be read, with few classes and with many."""

import warnings

import numpy as np
import pytest
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.evaluate.confusion import confusion_matrix, plot_confusion_matrix, truncate_name


def matrix(k: int, *, other: bool = False) -> np.ndarray:
  """Return the matrix of 10 examples a class, one predicted as the next class or as none."""
  labels = np.repeat(np.arange(k), 10)
  predicted = labels.copy()
  predicted[::10] = -1 if other else (labels[::10] + 1) % k
  return confusion_matrix(labels[:, None], predicted, k)


def pixels(path) -> np.ndarray:
  with Image.open(path) as picture:
    return np.asarray(picture.convert('RGB')).astype(int)


def test_the_last_column_counts_predictions_outside_the_data_set():
  assert matrix(3).tolist() == [[9, 1, 0, 0], [0, 9, 1, 0], [1, 0, 9, 0]]
  assert matrix(3, other=True).tolist() == [[9, 0, 0, 1], [0, 9, 0, 1], [0, 0, 9, 1]]


@pytest.mark.parametrize('k', [2, 5, 40, 1000])
def test_every_class_has_pixels_and_the_diagonal_is_dark(tmp_path, k):
  plot_confusion_matrix(
    matrix(k), tuple(f'class {i}' for i in range(k)), tmp_path / 'c.png', title='t'
  )
  image = pixels(tmp_path / 'c.png')
  # The blues of fractions from 0.9.
  dark = (image[..., 2] - image[..., 0] > 40) & (image[..., 0] < 60)
  rows = np.flatnonzero(dark.sum(axis=1))
  assert len(rows) >= 1.5 * k
  assert max(image.shape[:2]) < 4000


def test_a_single_mistake_is_visible(tmp_path):
  k, names = 1000, tuple(map(str, range(1000)))
  right = confusion_matrix(np.arange(k)[:, None], np.arange(k), k)
  wrong = right.copy()
  wrong[100] = 0
  wrong[100, [100, 900]] = 49, 1
  plot_confusion_matrix(right, names, tmp_path / 'right.png', title='t')
  plot_confusion_matrix(wrong, names, tmp_path / 'wrong.png', title='t')
  left = slice(0, 2000)
  differ = np.abs(pixels(tmp_path / 'right.png') - pixels(tmp_path / 'wrong.png'))[:, left].max(
    axis=2
  )
  assert (differ > 15).sum() >= 2


def test_names_are_written_literally_in_any_script(tmp_path):
  names = ('$x_', 'Ромашка', '雏菊', 'a' * 200)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    plot_confusion_matrix(matrix(4, other=True), names, tmp_path / 'c.png', title='$y_{ of $\\frac')
  assert (tmp_path / 'c.png').stat().st_size > 1000
  assert truncate_name('a' * 200) == 'a' * 31 + '…'


def test_an_unwritable_path_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r'nowhere/c\.png'):
    plot_confusion_matrix(matrix(2), ('a', 'b'), tmp_path / 'nowhere' / 'c.png', title='t')
