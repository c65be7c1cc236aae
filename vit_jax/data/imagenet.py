"""The names of ImageNet's classes, in the order of the released heads."""

import csv
import functools
import gzip
from pathlib import Path

NAMES_DIR = Path(__file__).parent / 'names'


def imagenet_class_names(which: str) -> tuple[str, ...]:
  """In words, each different from the others. `which`: imagenet1k (1,000) or imagenet21k (21,843)."""
  return tuple(name for _, name in _read_class_table(which))


def imagenet_synsets(which: str) -> tuple[str, ...]:
  """As WordNet numbers them, 'n01440764', which is what TFDS calls them."""
  return tuple(synset for synset, _ in _read_class_table(which))


@functools.cache
def _read_class_table(which: str) -> tuple[tuple[str, str], ...]:
  """(synset, name) of each class."""
  with (NAMES_DIR / f'{which}.csv').open(newline='') as file:
    return tuple((row['synset'], row['name']) for row in csv.DictReader(file))


def imagenet_subset_classes(which: str) -> tuple[int, ...]:
  """Those of ImageNet-1k's classes that ImageNet-A ('a') or ImageNet-R ('r') has, by their numbers."""
  place = {synset: i for i, synset in enumerate(imagenet_synsets('imagenet1k'))}
  with (NAMES_DIR / 'imagenet_subsets.csv').open(newline='') as file:
    return tuple(place[row['synset']] for row in csv.DictReader(file) if row['subset'] == which)


@functools.cache
def imagenet_real_labels() -> tuple[tuple[int, ...], ...]:
  """For each of ImageNet-1k's 50,000 validation images, in the order of their file names, the classes that are right for it
  (arXiv 2006.07159); none for some."""
  with gzip.open(NAMES_DIR / 'imagenet_real.txt.gz', 'rt') as file:
    return tuple(tuple(map(int, line.split())) for line in file)
