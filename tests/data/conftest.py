"""Small datasets on disk that several tests read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds


@pytest.fixture
def touch() -> Callable:
  """Create files that contain their own name, for tests that look only at names."""

  def touch(*paths: Path):
    for path in paths:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(path.name.encode())

  return touch


@pytest.fixture
def numbered(tmp_path, write_tfds, png) -> Path:
  """Write tfds:numbered: the pixels of image i are i, and the labels of `test` are unknown."""
  examples = [{'image': png(np.full((2, 3, 3), i, np.uint8)), 'label': i % 3} for i in range(10)]
  unlabelled = [example | {'label': -1} for example in examples]
  features = {
    'image': tfds.features.Image(),
    'label': tfds.features.ClassLabel(names=['a', 'b', 'c']),
  }
  dir = tmp_path / 'tfds'
  write_tfds(
    'numbered', dir, features, {'train': examples, 'test': unlabelled, 'validation': examples[:4]}
  )
  return dir


@pytest.fixture
def flat(tmp_path, touch) -> Path:
  """Create a folder of three classes with 4, 11 and 20 images, without splits."""
  for name, count in {'ant': 4, 'bee': 11, 'cow': 20}.items():
    touch(*(tmp_path / 'flat' / name / f'{i}.jpg' for i in range(count)))
  return tmp_path / 'flat'
