"""Where things are kept on this machine between runs."""

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
  """The folder for things of one kind in the user's cache directory; it need not be there yet."""
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vit_jax' / name
