"""Train and use Vision Transformers as in "An Image is Worth 16x16 Words" (arXiv 2010.11929)."""

__all__ = ['__version__', 'load']


def __getattr__(name: str):
  """Import `load` and look up `__version__` on first use.

  `load` needs jax, which `import vit_jax` must not import.
  """
  if name == 'load':
    from vit_jax.pretrained.loading import load

    return load
  if name == '__version__':
    from importlib.metadata import version

    return version('vit-jax')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
