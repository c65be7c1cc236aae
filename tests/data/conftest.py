"""Small data sets on disk that several tests read."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds


@pytest.fixture
def png() -> Callable:
  """An image -> the bytes of a PNG file."""
  return lambda image: cv2.imencode('.png', image)[1].tobytes()


@pytest.fixture
def touch() -> Callable:
  """Files that hold their own name: for all that looks at names only."""

  def touch(*paths: Path):
    for path in paths:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(path.name.encode())

  return touch


@pytest.fixture
def write_tfds() -> Callable:
  """(name, dir, features, {split: examples}) -> a TFDS data set written as ArrayRecord, in order."""

  def write(name: str, dir: Path, features: dict, splits: dict[str, list[dict]]):
    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version('1.2.3')

      def _info(self):
        features_dict = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features_dict, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in splits.items()}

      def _generate_examples(self):
        raise NotImplementedError

    Written.name = name
    Written(data_dir=dir, file_format='array_record').download_and_prepare()

  return write


@pytest.fixture
def numbered(tmp_path, write_tfds, png) -> Path:
  """Where tfds:numbered lies: images that say their number; the labels of `test` are unknown."""
  examples = [{'image': png(np.full((2, 3, 3), i, np.uint8)), 'label': i % 3} for i in range(10)]
  unlabelled = [example | {'label': -1} for example in examples]
  features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['a', 'b', 'c'])}
  dir = tmp_path / 'tfds'
  write_tfds('numbered', dir, features, {'train': examples, 'test': unlabelled, 'validation': examples[:4]})
  return dir


@pytest.fixture
def flat(tmp_path, touch) -> Path:
  """A folder of three classes of 4, 11 and 20 images, without splits."""
  for name, count in {'ant': 4, 'bee': 11, 'cow': 20}.items():
    touch(*(tmp_path / 'flat' / name / f'{i}.jpg' for i in range(count)))
  return tmp_path / 'flat'
