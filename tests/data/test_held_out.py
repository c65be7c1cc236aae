"""Parts of a split: 'train/held_out:10%' and 'train/rest:10%'."""

import pytest

from vit_jax.data.held_out import name_parts
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def names(source) -> list[str]:
  return [source[i][2] for i in range(len(source))]


def open_parts(name: str, split: str, percent: float, **options):
  return [open_source(name, part, **options) for part in name_parts(split, percent)]


@pytest.fixture
def sorted_folder(tmp_path, touch):
  """Return a folder whose split `train` has 1, 2, 25 and 40 images of four classes, by class."""
  for name, count in {'ant': 1, 'bee': 2, 'cow': 25, 'dog': 40}.items():
    touch(*(tmp_path / 'sorted' / 'train' / name / f'{i:02}.jpg' for i in range(count)))
  return f'folder:{tmp_path / "sorted"}'


def test_each_class_is_split_and_a_class_of_one_image_is_trained_on(sorted_folder):
  rest, held_out = open_parts(sorted_folder, 'train', 20)
  counts = [source.class_counts().tolist() for source in (rest, held_out)]
  assert counts == [[1, 1, 20, 32], [0, 1, 5, 8]]  # A fifth of 25 and 40, and one of two.


def test_the_parts_are_disjoint_and_together_the_split(sorted_folder):
  rest, held_out = map(names, open_parts(sorted_folder, 'train', 10))
  everything = names(open_source(sorted_folder, 'train'))
  assert not set(rest) & set(held_out)
  assert sorted(rest + held_out) == sorted(everything)
  assert rest == [name for name in everything if name in set(rest)]  # In order.


def test_examples_are_not_only_the_last_of_a_class(sorted_folder):
  """Files are sorted by name, and neighbours are often of the same day or camera."""
  _, held_out = open_parts(sorted_folder, 'train', 20)
  dogs = [int(name[-6:-4]) for name in names(held_out) if '/dog/' in name]
  assert len(dogs) == 8 and min(dogs) < 20


def test_a_slice_and_a_sum_of_splits_have_parts(sorted_folder):
  half = names(open_source('builtin:digits', 'train[:50%]'))
  rest, held_out = map(names, open_parts('builtin:digits', 'train[:50%]', 10))
  assert sorted(rest + held_out) == sorted(half)
  both = open_source('builtin:digits', 'train+test/held_out:10%')
  # Each digit has 50 of 500 in `test`; a tenth of both together is 180 within rounding.
  assert abs(len(both) - (1297 + 500) / 10) <= 5
  assert both.split == 'train+test'


def test_a_source_that_lists_no_labels_holds_out_its_last_examples(numbered):
  rest, held_out = open_parts('tfds:numbered', 'train', 20, dir=str(numbered))
  assert (len(rest), len(held_out)) == (8, 2)
  last = open_source('tfds:numbered', 'train[80%:]', dir=str(numbered))
  assert [held_out[i] for i in range(2)] == [last[i] for i in range(2)]


@pytest.mark.parametrize('percent', ['0', '100', '250'])
def test_a_part_of_nothing_or_everything_is_refused(percent):
  with pytest.raises(UserError, match='between 0% and 100%'):
    open_source('builtin:digits', f'train/held_out:{percent}%')


def test_an_unknown_part_is_an_unknown_split():
  with pytest.raises(UserError, match="no split 'train/other:10%'"):
    open_source('builtin:digits', 'train/other:10%')


@pytest.mark.parametrize('split', ['test', 'train/held_out:10%'])
def test_one_image_in_every_class_is_too_few_to_hold_one_out(tmp_path, touch, split):
  touch(*(tmp_path / 'few' / name / '0.jpg' for name in ('ant', 'bee')))
  with pytest.raises(UserError) as error:
    open_source(f'folder:{tmp_path / "few"}', split)
  assert f'{split!r}: each class needs two images or more' in str(error.value)
  assert ('--config.data.eval=folder:PATH' in str(error.value)) == (split == 'test')
