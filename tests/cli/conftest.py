"""Fixtures that run commands in a temporary directory, and that make photos."""

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig

COLORS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}


@pytest.fixture
def command(typed, tmp_path, monkeypatch):
  """Return a function that runs a command in `tmp_path`: (exit code, stdout, stderr)."""
  monkeypatch.chdir(tmp_path)
  return typed


@pytest.fixture
def photos(tmp_path):
  """Return a folder of noisy images of three colors, ten of each."""
  rng = np.random.default_rng(0)
  for name, color in COLORS.items():
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(10):
      noise = rng.integers(-30, 31, (40, 32, 3))
      pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'photos' / name / f'{i}.png')
  google_file(
    tmp_path / 'model.npz', ModelConfig(variant='mu/8', depth=2), classes=0, size=(32, 32)
  )
  return tmp_path / 'photos'
