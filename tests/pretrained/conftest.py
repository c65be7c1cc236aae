"""transformers, where it is installed; a test that asks for it is skipped where it is not."""

import warnings

import pytest


@pytest.fixture(scope='session')
def transformers(timm):
  """The module, which imports torchvision too."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')
