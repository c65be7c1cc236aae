"""Names and synsets of ImageNet's classes."""

import pytest

from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets


@pytest.mark.parametrize(('which', 'classes'), [('imagenet1k', 1000), ('imagenet21k', 21843)])
def test_names_and_synsets_are_unique(which, classes):
  for names in (imagenet_class_names(which), imagenet_synsets(which)):
    assert len(names) == len(set(names)) == classes
    assert all(name.strip() == name != '' for name in names)
  # The released heads are in the order of the synsets.
  assert list(imagenet_synsets(which)) == sorted(imagenet_synsets(which))


def test_known_classes_have_their_published_index():
  names = imagenet_class_names('imagenet1k')
  assert (names[0], imagenet_synsets('imagenet1k')[0]) == ('tench', 'n01440764')
  assert (names[207], names[985], names[999]) == ('Golden Retriever', 'daisy', 'toilet paper')
  assert imagenet_class_names('imagenet21k')[0] == 'organism, being'


def test_imagenet21k_contains_all_but_one_class_of_imagenet1k():
  missing = set(imagenet_synsets('imagenet1k')) - set(imagenet_synsets('imagenet21k'))
  assert len(missing) == 1  # WordNet moved one synset.


def test_a_name_that_two_classes_share_includes_the_synset():
  assert 'missile (n03773504)' in imagenet_class_names('imagenet1k')
