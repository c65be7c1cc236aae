"""Vision Transformers the way the paper trained them ("An Image is Worth 16x16 Words", arXiv 2010.11929)."""

__all__ = ['load']


def __getattr__(name: str):
  """`vit_jax.load`, imported when it is asked for: it needs jax, and `import vit_jax` should not."""
  if name == 'load':
    from vit_jax.pretrained.loading import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
