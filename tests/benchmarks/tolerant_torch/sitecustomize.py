"""Make each Python whose path has this folder tolerant of an uncompiled torchvision.

The fixture `timm` of conftest.py does so for the process of the tests.
"""

import sys

from tests.torchvision_operators import tolerant


class _BeforeTorchvision:
  """Wraps `torch.library.register_fake` when torchvision is about to be imported."""

  def find_spec(self, name, path=None, target=None):
    del path, target
    if name == 'torchvision':
      import torch

      sys.meta_path.remove(self)
      torch.library.register_fake = tolerant(torch.library.register_fake)


sys.meta_path.insert(0, _BeforeTorchvision())
