"""A data set's classes among a model's: by name, in any order, some of them, ImageNet's by their synsets."""

import pytest

from vit_jax.data.class_names import is_imagenet_validation, match_classes
from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets
from vit_jax.errors import UserError

NAMES = ('cat', 'cow', 'dog', 'hen')


def match(theirs, ours, classes=None):
  columns, notes = match_classes(
    tuple(theirs), tuple(ours), classes=classes or len(ours), source='M'
  )
  return columns.tolist(), notes


def test_the_same_classes_need_no_word():
  assert match(NAMES, NAMES) == ([0, 1, 2, 3], [])


def test_another_order_is_matched_by_name():
  columns, notes = match(NAMES, NAMES[::-1])
  assert columns == [3, 2, 1, 0]
  assert notes == ['the data has the classes in another order: they are matched by name']


def test_some_of_the_classes_are_found_among_all():
  columns, notes = match(['dog', 'cow'], NAMES)
  assert columns == [2, 1]
  assert notes == ['the data has 2 of the 4 classes: a prediction of any other is wrong']


def test_a_model_without_names_takes_the_data_in_its_order():
  columns, notes = match(NAMES, (), classes=4)
  assert columns == [0, 1, 2, 3]
  assert 'does not name its classes' in notes[0]
  with pytest.raises(UserError, match='the data has 3 classes, and M 4 without names'):
    match(NAMES[:3], (), classes=4)


@pytest.mark.parametrize('which', ['imagenet1k', 'imagenet21k'])
def test_imagenets_synsets_are_its_classes(which):
  words, numbers = imagenet_class_names(which), imagenet_synsets(which)
  assert match(numbers, words) == (list(range(len(words))), [])
  columns, notes = match(numbers[::250], words)
  assert columns == list(range(0, len(words), 250))
  assert len(notes) == 1


def test_a_class_that_the_model_lacks_is_named():
  with pytest.raises(
    UserError, match=r"M has no classes 'cow', 'hen', which the data has, and has 'owl' instead"
  ):
    match(NAMES, ['cat', 'owl', 'dog'])
  with pytest.raises(UserError, match=r"'a0', 'a1', 'a2', 'a3', 'a4' and 7 more"):
    match([f'a{i}' for i in range(12)], NAMES)


def test_a_name_that_means_two_classes_is_refused():
  with pytest.raises(UserError, match="several classes of the name 'crane'"):
    match(['crane', 'cat'], ['cat', 'crane', 'crane'])
  assert match(['cat', 'crane', 'crane'], ['cat', 'crane', 'crane'])[0] == [0, 1, 2]


def test_only_the_whole_validation_split_is_what_published_numbers_speak_of():
  words, numbers = imagenet_class_names('imagenet1k'), imagenet_synsets('imagenet1k')
  for names in (words, numbers):
    assert is_imagenet_validation(names, examples=50_000, max_labels=1)
  assert not is_imagenet_validation(words, examples=10_000, max_labels=1)  # ImageNet-V2.
  assert not is_imagenet_validation(words, examples=50_000, max_labels=8)  # ReaL.
  assert not is_imagenet_validation(words[:100], examples=50_000, max_labels=1)
