"""timm and transformers, where they are installed; a test that asks for them is skipped where they are not."""

import warnings

import pytest


def tolerant(register_fake):
  """`torch.library.register_fake` that passes over operators of a torchvision without its compiled part."""

  def register(name, *args, **kwargs):
    function = register_fake(name, *args, **kwargs)

    def apply(implementation):
      try:
        return function(implementation)
      except RuntimeError as error:
        if 'does not exist' not in str(error):
          raise
        return implementation

    return apply

  return register


@pytest.fixture(scope='session')
def timm():
  """The module."""
  torch = pytest.importorskip('torch')
  real = torch.library.register_fake
  torch.library.register_fake = tolerant(real)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return pytest.importorskip('timm')
  finally:
    torch.library.register_fake = real


@pytest.fixture(scope='session')
def transformers(timm):
  """The module, which imports torchvision too."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')
