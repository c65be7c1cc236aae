"""Fit the parameters of a run to evaluation images of another size (`data.eval_size`).

Tables of positions have a row for each patch, or for each offset between patches. They are
resampled as they are when a checkpoint is loaded. All other parameters have to fit every size.
"""

from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import POSITION_EMBEDDING, RELATIVE_TABLE
from vit_jax.pretrained.resample import resample_offsets, resample_positions
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import Mesh
from vit_jax.step import abstract_params

POSITION_TABLES = (POSITION_EMBEDDING, RELATIVE_TABLE)


def abstract_eval_params(config: Config, model: nn.Module, params: dict) -> dict:
  """Return the shapes of the parameters in evaluation, as those in training, `params`.

  Raises UserError if the model cannot take images of `data.eval_size`, or if a parameter other than
  a table of positions has another shape there.
  """
  data, setting = config.data, f'config.data.eval_size={config.data.eval_size}'
  if data.eval_image_size == data.size:
    return params
  try:
    model.shape.grid(data.eval_image_size)
  except UserError as error:
    raise UserError(f'{setting}: {error}') from None
  shapes = abstract_params(model, data.eval_image_size)
  old, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (params, shapes))
  for name, leaf in new.items():
    if leaf.shape != old[name].shape and not name.endswith(POSITION_TABLES):
      raise UserError(
        f'{setting}: {config.model.variant} cannot be evaluated at another size than '
        f'config.data.size={data.size}: {name} has the shape {leaf.shape} there, and '
        f'{old[name].shape} in training'
      )
  return shapes


def make_resample(
  config: Config, model: nn.Module, params: dict, eval_params: dict, mesh: Mesh
) -> Callable[[dict], dict]:
  """Return a function that fits the sharded parameters of training to evaluation.

  It returns them as they are if the images have as many patches in each direction.

  Args:
    config: The config of the run.
    model: Its model.
    params: The shapes of the parameters in training.
    eval_params: Those in evaluation, from `abstract_eval_params`.
    mesh: The devices.
  """
  grids = model.shape.grid(config.data.eval_image_size), model.shape.grid(config.data.size)
  old, new = (flax.traverse_util.flatten_dict(tree, sep='/') for tree in (params, eval_params))
  tables = [] if grids[0] == grids[1] else [name for name in new if name.endswith(POSITION_TABLES)]
  matrices = {
    name: resample_matrix(
      name, new[name].shape[1], old[name].shape[1], grids, config.init_positions
    )
    for name in tables
  }
  if not matrices:
    return lambda params: params

  def apply(flat: dict) -> dict:
    return {
      name: jnp.einsum('nr,lrd->lnd', matrix, flat[name], precision='highest')
      for name, matrix in matrices.items()
    }

  shardings = flax.traverse_util.flatten_dict(state_shardings(eval_params, mesh), sep='/')
  # Of the tables alone: a program of all parameters would copy them.
  apply = jax.jit(apply, out_shardings={name: shardings[name] for name in tables})

  def resample(params: dict) -> dict:
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    flat |= apply({name: flat[name] for name in tables})
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return resample


def resample_matrix(
  name: str, rows: int, old_rows: int, grids: tuple[tuple[int, int], tuple[int, int]], method: str
) -> np.ndarray:
  """Return the matrix [rows, old_rows] by which a table [l, old_rows, d] is resampled.

  Resampling is linear, so that resampling the unit vectors gives its matrix.
  """
  units = np.eye(old_rows)[None]
  if name.endswith(RELATIVE_TABLE):
    return resample_offsets(units, *grids)[0].astype(np.float32)
  return resample_positions(units, rows, *grids, method)[0].astype(np.float32)
