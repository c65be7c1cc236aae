"""Select parameters by their paths.

The path of a parameter is its names joined by '/', such as
`Transformer/encoderblock/MlpBlock_3/Dense_0/kernel`. Settings that select parameters are regular
expressions that match a full path.
"""

import re

import jax

from vit_jax.errors import UserError


def param_path(keys) -> str:
  """Return the path of a parameter from the dict keys that jax.tree_util gives."""
  return '/'.join(str(key.key) for key in keys)


def match_params(params, pattern: str, name: str):
  """Return a tree of bools that tells which parameters have a full path matching `pattern`.

  Raises UserError, which names the setting config.optim.`name`, if no path matches.
  """
  matches = jax.tree.map_with_path(
    lambda keys, _: bool(re.fullmatch(pattern, param_path(keys))), params
  )
  if not any(jax.tree.leaves(matches)):
    example = param_path(jax.tree.leaves_with_path(params)[0][0])
    raise UserError(
      f'config.optim.{name}={pattern!r} matches no parameter; the pattern must match a full path, '
      f'such as {example!r}'
    )
  return matches
