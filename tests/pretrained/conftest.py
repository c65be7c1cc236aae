"""Fixture for transformers. Tests that need it are skipped if it is not installed."""

import warnings

import pytest


@pytest.fixture(scope='session')
def transformers(timm):
  """Return the module transformers. Its import also imports torchvision."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')
