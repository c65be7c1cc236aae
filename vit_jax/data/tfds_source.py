"""TFDS data sets."""

from vit_jax.errors import UserError


class Tfds:
  def __init__(self, name: str, *, dir: str = ''):
    raise UserError('not yet')
