"""Small photographs of four classes, and small models of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.data.sources import open_source

NAMES = ('cat', 'cow', 'dog', 'hen')
SIZE = (16, 16)


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> Path:
  """Return a folder of 37 photographs, of unequal classes, not a multiple of a batch."""
  root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
  for i in range(37):
    folder = root / 'val' / NAMES[(0, 1, 1, 2, 3)[i % 5]]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / f'{i:02}.png')
  return root


@pytest.fixture
def source(photos):
  """Return the photographs as a source."""
  return open_source(f'folder:{photos}', 'val')


@pytest.fixture
def make_model(tmp_path):
  """Return a function labels -> model with random weights and classes of these names."""

  def make(labels=NAMES, **fields):
    google_file(
      tmp_path / 'model.npz',
      ModelConfig(variant='mu/4', **fields),
      classes=len(labels) or 4,
      size=SIZE,
    )
    return vit_jax.load(str(tmp_path / 'model.npz'), labels=tuple(labels) or None)

  return make


@pytest.fixture
def by_hand():
  """Return a function (model, source) -> (label names, logits in float64), without a loader."""

  def by_hand(model, source):
    images, names = [], []
    for i in range(len(source)):
      data, labels, _ = source[i]
      images.append(np.asarray(Image.open(io.BytesIO(data))))
      names.append([source.label_names[label] for label in labels])
    return names, np.asarray(model.logits(np.stack(images)), np.float64)

  return by_hand
