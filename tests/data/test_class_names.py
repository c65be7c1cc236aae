"""Classes of a data set are matched to those of a model by name, in any order, also by synset."""

import pytest

from vit_jax.data.class_names import is_imagenet_validation, match_classes
from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets
from vit_jax.errors import UserError

NAMES = ('cat', 'cow', 'dog', 'hen')


def match(data_names, model_names, classes=None):
  columns, notes = match_classes(
    tuple(data_names), tuple(model_names), classes=classes or len(model_names), source='M'
  )
  return columns.tolist(), notes


def test_equal_classes_give_no_note():
  assert match(NAMES, NAMES) == ([0, 1, 2, 3], [])


def test_another_order_is_matched_by_name():
  columns, notes = match(NAMES, NAMES[::-1])
  assert columns == [3, 2, 1, 0]
  assert len(notes) == 1


def test_a_subset_of_the_classes_is_matched():
  columns, notes = match(['dog', 'cow'], NAMES)
  assert columns == [2, 1]
  assert '2 of the 4 classes' in notes[0]


def test_composed_and_decomposed_names_match():
  assert match(['cafe\u0301', 'bar'], ['bar', 'caf\u00e9'])[0] == [1, 0]
  assert match(['caf\u00e9'], ['bar', 'cafe\u0301'])[0] == [1]


def test_a_model_without_names_assumes_the_order_of_the_data():
  columns, notes = match(NAMES, (), classes=4)
  assert columns == [0, 1, 2, 3]
  assert len(notes) == 1
  with pytest.raises(UserError, match='3 classes.* M has 4'):
    match(NAMES[:3], (), classes=4)


@pytest.mark.parametrize('which', ['imagenet1k', 'imagenet21k'])
def test_synsets_of_imagenet_are_matched_to_its_names(which):
  words, numbers = imagenet_class_names(which), imagenet_synsets(which)
  assert match(numbers, words) == (list(range(len(words))), [])
  columns, notes = match(numbers[::250], words)
  assert columns == list(range(0, len(words), 250))
  assert len(notes) == 1


def test_a_class_that_the_model_lacks_is_named_in_the_error():
  with pytest.raises(UserError, match="M lacks .*'cow', 'hen'.*'owl'"):
    match(NAMES, ['cat', 'owl', 'dog'])
  with pytest.raises(UserError, match=r"'a0', 'a1', 'a2', 'a3', 'a4' and 7 more"):
    match([f'a{i}' for i in range(12)], NAMES)


def test_a_name_of_two_classes_raises():
  with pytest.raises(UserError, match="several classes .*'crane'"):
    match(['crane', 'cat'], ['cat', 'crane', 'crane'])
  assert match(['cat', 'crane', 'crane'], ['cat', 'crane', 'crane'])[0] == [0, 1, 2]


def test_only_the_complete_validation_split_is_recognized():
  words, numbers = imagenet_class_names('imagenet1k'), imagenet_synsets('imagenet1k')
  for names in (words, numbers):
    assert is_imagenet_validation(names, examples=50_000, max_labels=1)
  assert not is_imagenet_validation(words, examples=10_000, max_labels=1)  # ImageNet-V2.
  assert not is_imagenet_validation(words, examples=50_000, max_labels=8)  # ReaL.
  assert not is_imagenet_validation(words[:100], examples=50_000, max_labels=1)
