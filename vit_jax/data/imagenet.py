"""ImageNet's classes in the order of the released heads, and its ReaL validation labels."""

import csv
import functools
import gzip
from pathlib import Path

NAMES_DIR = Path(__file__).parent / 'names'


def imagenet_class_names(label_set: str) -> tuple[str, ...]:
  """Return the distinct English names of 'imagenet1k' (1,000) or 'imagenet21k' (21,843)."""
  return tuple(name for _, name in _read_class_table(label_set))


def imagenet_synsets(label_set: str) -> tuple[str, ...]:
  """Return the WordNet synsets, such as 'n01440764', which TFDS uses as names."""
  return tuple(synset for synset, _ in _read_class_table(label_set))


@functools.cache
def _read_class_table(label_set: str) -> tuple[tuple[str, str], ...]:
  """Return (synset, name) of each class."""
  with (NAMES_DIR / f'{label_set}.csv').open(newline='', encoding='utf-8') as file:
    return tuple((row['synset'], row['name']) for row in csv.DictReader(file))


def imagenet_subset_classes(subset: str) -> tuple[int, ...]:
  """Return the ImageNet-1k indices of the classes of ImageNet-A ('a') or ImageNet-R ('r')."""
  index = {synset: i for i, synset in enumerate(imagenet_synsets('imagenet1k'))}
  with (NAMES_DIR / 'imagenet_subsets.csv').open(newline='', encoding='utf-8') as file:
    return tuple(index[row['synset']] for row in csv.DictReader(file) if row['subset'] == subset)


@functools.cache
def imagenet_real_labels() -> tuple[tuple[int, ...], ...]:
  """Return the ReaL labels (arXiv 2006.07159) of ImageNet-1k's 50,000 validation images.

  Each image, in the order of file names, has the tuple of its correct classes, which may be empty.
  """
  with gzip.open(NAMES_DIR / 'imagenet_real.txt.gz', 'rt', encoding='utf-8') as file:
    return tuple(tuple(map(int, line.split())) for line in file)
