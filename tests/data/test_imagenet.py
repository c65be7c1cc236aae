"""The names of ImageNet's classes, in the order of the released heads."""

import pytest

from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets


@pytest.mark.parametrize(('which', 'classes'), [('imagenet1k', 1000), ('imagenet21k', 21843)])
def test_every_class_has_a_name_and_a_synset_of_its_own(which, classes):
  for names in (imagenet_class_names(which), imagenet_synsets(which)):
    assert len(names) == len(set(names)) == classes
    assert all(name.strip() == name != '' for name in names)
  assert list(imagenet_synsets(which)) == sorted(
    imagenet_synsets(which)
  )  # The order of the released heads.


def test_known_classes_are_at_their_places():
  names = imagenet_class_names('imagenet1k')
  assert (names[0], imagenet_synsets('imagenet1k')[0]) == ('tench', 'n01440764')
  assert (names[207], names[985], names[999]) == ('Golden Retriever', 'daisy', 'toilet paper')
  assert imagenet_class_names('imagenet21k')[0] == 'organism, being'


def test_all_but_one_of_imagenets_classes_are_among_the_larger_sets():
  assert (
    len(set(imagenet_synsets('imagenet1k')) - set(imagenet_synsets('imagenet21k'))) == 1
  )  # Since one was moved.


def test_a_name_of_two_classes_says_which():
  assert 'missile (n03773504)' in imagenet_class_names('imagenet1k')
