"""Fit the parameters of a run to evaluation images of another size (`data.eval_size`).

Only position embeddings have a row for each patch. They are resampled as they are when a checkpoint
is loaded. All other parameters fit every size.
"""

from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.pretrained.arrays import POSITION_EMBEDDING, RELATIVE_TABLE
from vit_jax.pretrained.resample import resample_offsets, resample_positions
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.step import abstract_params
from vit_jax.training.program import Program

POSITION_TABLES = (POSITION_EMBEDDING, RELATIVE_TABLE)


def make_resample(program: Program) -> tuple[dict, Callable[[dict], dict]]:
  """Return the shapes of parameters in evaluation, and a function that fits parameters to them.

  The shapes are a tree of `jax.ShapeDtypeStruct`. The function maps sharded parameters to sharded
  parameters. It returns them as they are if no shape changes. Raises UserError if the model cannot
  take images of `data.eval_size`.
  """
  data = program.config.data
  old = flax.traverse_util.flatten_dict(program.param_shapes, sep='/')
  shapes = abstract_params(program.model, data.eval_image_size)
  new = flax.traverse_util.flatten_dict(shapes, sep='/')
  shape = program.model.shape
  is_same_grid = shape.grid(data.eval_image_size) == shape.grid(data.size)
  tables = [] if is_same_grid else [name for name in new if name.endswith(POSITION_TABLES)]
  matrices = {
    name: resample_matrix(program, name, old[name].shape[1], new[name].shape[1]) for name in tables
  }
  if not matrices:
    return shapes, lambda params: params

  def resample(params: dict) -> dict:
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    for name, matrix in matrices.items():
      flat[name] = jnp.einsum('nr,lrd->lnd', matrix, flat[name], precision='highest')
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return shapes, jax.jit(resample, out_shardings=state_shardings(shapes, program.mesh))


def resample_matrix(program: Program, name: str, old_rows: int, new_rows: int) -> np.ndarray:
  """Return the matrix [new_rows, old_rows] by which an array [l, rows, d] is resampled.

  Resampling is linear, so that resampling the unit vectors gives its matrix.
  """
  data, shape = program.config.data, program.model.shape
  grids = shape.grid(data.eval_image_size), shape.grid(data.size)
  rows = np.eye(old_rows)[None]
  if name.endswith(RELATIVE_TABLE):
    return resample_offsets(rows, *grids)[0].astype(np.float32)
  method = program.config.init_positions
  return resample_positions(rows, new_rows, *grids, method)[0].astype(np.float32)
