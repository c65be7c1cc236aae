"""Read the tensors of a PyTorch checkpoint (.pth, .pt, .bin) without running code from it.

`torch.load(weights_only=True)` reads tensors and plain containers, and refuses everything else.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError, check_installed, one_line

# Keys under which training scripts save the weights, in the order of preference.
STATE_DICT_KEYS = ('model', 'state_dict', 'model_state', 'teacher', 'ema')


def read_torch_file(path: Path, *, mmap: bool) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Return {name: array} of the tensors of a checkpoint, and notes about what was chosen.

  bfloat16 becomes float32. With `mmap`, which needs the zip format of PyTorch 1.6 and later, data
  is read when an array is accessed.

  Raises UserError if PyTorch is not installed, if the file contains other objects than tensors and
  plain containers, or if it contains no tensors.
  """
  check_installed(f'reading {path}, a PyTorch checkpoint,', 'torch', 'torch')
  import torch

  try:
    content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
  except Exception as error:
    raise _explain(path, error) from None
  state, notes = _find_state_dict(content)
  tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
  if not tensors:
    found = ', '.join(map(str, list(state)[:8])) or 'nothing'
    raise UserError(f'{path} contains no tensors by name; it contains {found}')
  return {name: _to_numpy(tensor) for name, tensor in tensors.items()}, notes


def _find_state_dict(content) -> tuple[Mapping, tuple[str, ...]]:
  """Return the innermost mapping under STATE_DICT_KEYS, and a note for each key."""
  notes = ()
  while isinstance(content, Mapping):
    keys = [key for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)]
    if not keys:
      return content, notes
    others = f'; {", ".join(map(repr, keys[1:]))} ignored' if len(keys) > 1 else ''
    notes += (f'the weights are those under {keys[0]!r} in the file{others}',)
    content = content[keys[0]]
  return {}, notes


def _to_numpy(tensor) -> np.ndarray:
  import torch

  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    tensor = tensor.float()
  return tensor.contiguous().numpy()


def _explain(path: Path, error: Exception) -> UserError:
  """Return the one-line error with the lines that convert the file."""
  reason = one_line(error)
  if 'weights_only' not in reason and 'WeightsUnpickler' not in reason:
    return UserError(f'{path} is a PyTorch checkpoint that cannot be read: {reason}')
  return UserError(
    f'{path} is a PyTorch checkpoint with objects that can run code when they are read. If you '
    'trust it, save its tensors alone in Python: '
    f"c = torch.load('{path.name}', weights_only=False); "
    "torch.save(c.get('model', c), 'weights.pth')"
  )
