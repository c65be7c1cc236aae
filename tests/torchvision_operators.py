"""Let timm be imported beside a torchvision that was built without its compiled operators."""


def tolerant(register_fake):
  """Wrap `torch.library.register_fake` to skip operators that an uncompiled torchvision lacks."""

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
