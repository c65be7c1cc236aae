"""Figure 12: inference speed and largest batch by image size, on the devices of this machine.

As in the paper (App. D.5), batches have 1, 2, 4, … 1,024 images. The speed is that of the fastest
batch.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.families import build_model
from vit_jax.paper.published import read_published_table
from vit_jax.sharding.mesh import batch_sharding, describe_mesh, make_mesh, replicated
from vit_jax.step import predict_logits

MAX_BATCH_PER_DEVICE = 1024  # Images.
_SPEED_CLASSES = 1000
_MIN_TIMING_SECONDS = 0.5  # The least time to measure a batch size.


@dataclasses.dataclass(frozen=True, slots=True)
class SpeedResult:
  """Speed of one model at one image size, for each device.

  `max_batch` is in images, 0 if no batch fits.
  """

  model: str
  image_size: int  # Pixels of a side.
  images_per_second: float
  max_batch: int


def measure_speeds(
  models: list[str], sizes: list[int], *, dtype: str, max_batch: int = MAX_BATCH_PER_DEVICE
) -> Iterator[SpeedResult]:
  """Yield the speed of each model at each size, in pixels, as it is measured."""
  mesh = make_mesh(1, batches={})
  for model in models:
    for pixels in sizes:
      yield _measure_speed(model, pixels, mesh=mesh, dtype=dtype, max_batch=max_batch)


def _measure_speed(model: str, pixels: int, *, mesh, dtype: str, max_batch: int) -> SpeedResult:
  """Measure a model with batches that double, up to `max_batch` or until one does not fit."""
  built = build_model(ModelConfig(variant=model, dtype=dtype), _SPEED_CLASSES)
  stride = built.shape.stride[0]
  side = round(pixels / stride) * stride  # 70 for patches of 14, as in the paper.
  init = jax.jit(
    lambda: built.init(jax.random.key(0), jnp.zeros((1, side, side, 3), jnp.uint8)),
    out_shardings=replicated(mesh),
  )
  params = init()['params']
  run = jax.jit(
    functools.partial(predict_logits, model=built),
    in_shardings=(replicated(mesh), batch_sharding(mesh)),
    out_shardings=batch_sharding(mesh),
  )
  best, most, batch = 0.0, 0, 1
  while batch <= max_batch:
    try:
      seconds = _time_forward(
        run,
        params,
        jax.device_put(
          jnp.zeros((batch * mesh.size, side, side, 3), jnp.uint8), batch_sharding(mesh)
        ),
      )
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      break
    best, most, batch = max(best, batch / seconds), batch, batch * 2
  return SpeedResult(model, side, best, most)


def _time_forward(run, params, images: jax.Array) -> float:
  """Return the mean seconds of a call, over half a second, after one call that compiles."""
  jax.block_until_ready(run(params, images))
  calls, began = 0, time.monotonic()
  while (passed := time.monotonic() - began) < _MIN_TIMING_SECONDS:
    jax.block_until_ready(run(params, images))
    calls += 1
  return passed / calls


def _read_paper_speeds() -> dict[tuple[str, int], tuple[float, int]]:
  """Return {(model, pixels): (images per second, largest batch)} of a TPUv3 core."""
  found = {}
  for row in read_published_table('fig12'):
    key = row['model'].replace('ViT-', ''), int(row['input_px'])
    found.setdefault(key, {})[row['metric']] = float(row['value'])
  return {
    key: (each['speed_img_s_core'], int(each.get('max_batch_per_core', 0)))
    for key, each in found.items()
  }


def figure_12_models() -> list[str]:
  """Return the models of Figure 12."""
  return list(dict.fromkeys(model for model, _ in _read_paper_speeds()))


def format_speeds(speeds: Iterator[SpeedResult]) -> Iterator[str]:
  """Yield a line for each result, with the paper's number for a TPUv3 core."""
  paper = _read_paper_speeds()
  devices = describe_mesh(make_mesh(1, batches={}))
  yield f'{devices}; images per second and largest batch of a device; paper: of a TPUv3 core'
  for each in speeds:
    speed, largest = paper.get((each.model, each.image_size), (None, None))
    paper_text = f'  paper {speed:9,.1f}  {largest:5,}' if speed else ''
    ours = f'{each.images_per_second:10,.1f}  {each.max_batch:5,}'
    yield f'{each.model:8} {each.image_size:4} px {ours}{paper_text}'
