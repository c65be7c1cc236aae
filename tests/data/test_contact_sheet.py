"""The contact sheet: the layout, the scale of the images and the labels."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.contact_sheet import write_contact_sheet
from vit_jax.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(n: int, h: int, w: int, color) -> np.ndarray:
  return np.full((n, h, w, 3), color, np.uint8)


def pixels(path) -> np.ndarray:
  with Image.open(path) as sheet:
    return np.asarray(sheet.convert('RGB'))


def test_training_images_are_on_the_left_and_evaluation_images_on_the_right(tmp_path):
  path = tmp_path / 'deep' / 'sheet.png'
  write_contact_sheet(
    plain(7, 28, 28, RED), ['red'] * 7, plain(3, 28, 28, BLUE), ['blue'] * 3, path
  )
  sheet = pixels(path)
  red, blue = ((sheet == color).all(axis=2) for color in (RED, BLUE))
  assert (red.sum(), blue.sum()) == (
    7 * 110**2,
    3 * 110**2,
  )  # 28 pixels times 4, less a border of one on each side.
  assert np.flatnonzero(red.any(axis=0)).max() < np.flatnonzero(blue.any(axis=0)).min()


def test_small_images_are_enlarged_by_an_integer_factor(tmp_path):
  image = np.zeros((1, 8, 8, 3), np.uint8)
  image[0, ::2, ::2] = image[0, 1::2, 1::2] = (0, 255, 0)
  write_contact_sheet(image, ['board'], plain(1, 8, 8, BLUE), ['blue'], tmp_path / 'sheet.png')
  green = (pixels(tmp_path / 'sheet.png') == (0, 255, 0)).all(axis=2)
  row = green[np.flatnonzero(green.any(axis=1))[5]]
  assert (
    np.diff(np.flatnonzero(np.diff(row.astype(int)))).tolist()[1:] == [14] * 6
  )  # The border covers the first.


def test_large_images_shrink_and_at_most_25_are_shown(tmp_path):
  write_contact_sheet(
    plain(64, 448, 300, RED),
    ['x'] * 64,
    plain(64, 448, 300, BLUE),
    ['y'] * 64,
    tmp_path / 'sheet.png',
  )
  red = (pixels(tmp_path / 'sheet.png') == RED).all(axis=2)
  assert red.sum() == 25 * 222 * 148


def test_labels_are_under_the_images_and_truncated_if_too_long(tmp_path):
  sheets = []
  for name in (
    '',
    'daisy',
    'Ромашка',
    'a label that is wider than any image',
    'a label that is wider than its own',
  ):
    write_contact_sheet(
      plain(1, 28, 28, RED), [name], plain(1, 28, 28, BLUE), [''], tmp_path / 'sheet.png'
    )
    sheets.append(pixels(tmp_path / 'sheet.png'))
  blank, daisy, cyrillic, long, other = sheets
  differs = lambda a, b: (a != b).any(axis=2)
  top = np.flatnonzero((blank == RED).all(axis=2).any(axis=1)).max()
  for sheet in (daisy, cyrillic, long):
    rows, columns = np.nonzero(differs(sheet, blank))
    assert top < rows.min() < rows.max() < top + 25
    assert columns.max() < 32 + 112
  assert not differs(long, other).any()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('', encoding='utf-8')
  with pytest.raises(UserError, match=r'file/sheet\.png'):
    write_contact_sheet(
      plain(1, 8, 8, RED), ['a'], plain(1, 8, 8, BLUE), ['b'], tmp_path / 'file' / 'sheet.png'
    )


def test_grey_images_of_one_channel_are_shown(tmp_path):
  image = np.full((2, 28, 28, 1), 99, np.uint8)
  write_contact_sheet(image, ['a', 'b'], image, ['a', 'b'], tmp_path / 'sheet.png')
  grey = (pixels(tmp_path / 'sheet.png') == 99).all(axis=2)
  assert grey.sum() == 4 * 110**2
