"""The names of ImageNet's classes, in the order of the released heads."""

import csv
import functools
from pathlib import Path

NAMES = Path(__file__).parent / 'names'


def class_names(which: str) -> tuple[str, ...]:
  """In words, each different from the others. `which`: imagenet1k (1,000) or imagenet21k (21,843)."""
  return tuple(name for _, name in rows(which))


def synsets(which: str) -> tuple[str, ...]:
  """As WordNet numbers them, 'n01440764', which is what TFDS calls them."""
  return tuple(synset for synset, _ in rows(which))


@functools.cache
def rows(which: str) -> tuple[tuple[str, str], ...]:
  """(synset, name) of each class."""
  with (NAMES / f'{which}.csv').open(newline='') as file:
    return tuple((row['synset'], row['name']) for row in csv.DictReader(file))
