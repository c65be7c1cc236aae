"""Figure 12: how fast models predict, and how many images they take at once, by the size of the images, on these devices.

As the paper (App. D.5): batches of 1, 2, 4, … 1,024 images, the speed of the fastest, the size of the largest that fits.
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

MAX_BATCH_PER_DEVICE = 1024  # Images for each device.
_SPEED_CLASSES = 1000
_MIN_TIMING_SECONDS = 0.5  # Of measuring each batch, at least.


@dataclasses.dataclass(frozen=True, slots=True)
class SpeedResult:
  """Of one model at one size: images a second of a device, and the largest batch for one; 0 where none fits."""

  model: str
  pixels: int
  images_per_second: float
  largest: int


def measure_speeds(
  models: list[str], sizes: list[int], *, dtype: str, largest: int = MAX_BATCH_PER_DEVICE
) -> Iterator[SpeedResult]:
  """One after another, each as soon as it is known."""
  mesh = make_mesh(1, batches={})
  for model in models:
    for pixels in sizes:
      yield _measure_speed(model, pixels, mesh=mesh, dtype=dtype, largest=largest)


def _measure_speed(model: str, pixels: int, *, mesh, dtype: str, largest: int) -> SpeedResult:
  """Over batches that double until one does not fit, or takes so long that the next would tell nothing new."""
  built = build_model(ModelConfig(variant=model, dtype=dtype), _SPEED_CLASSES)
  stride = built.shape.stride[0]
  side = round(pixels / stride) * stride  # 70 for patches of 14, as the paper has it.
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
  while batch <= largest:
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
  """Seconds of one call, over as many as half a second takes, after one that compiles."""
  jax.block_until_ready(run(params, images))
  calls, began = 0, time.monotonic()
  while (passed := time.monotonic() - began) < _MIN_TIMING_SECONDS:
    jax.block_until_ready(run(params, images))
    calls += 1
  return passed / calls


def _read_paper_speeds() -> dict[tuple[str, int], tuple[float, int]]:
  """{(model, pixels): (images a second of a TPUv3 core, its largest batch)}."""
  found = {}
  for row in read_published_table('fig12'):
    key = row['model'].replace('ViT-', ''), int(row['input_px'])
    found.setdefault(key, {})[row['metric']] = float(row['value'])
  return {
    key: (each['speed_img_s_core'], int(each.get('max_batch_per_core', 0)))
    for key, each in found.items()
  }


def figure_12_models() -> list[str]:
  """Of the figure."""
  return list(dict.fromkeys(model for model, _ in _read_paper_speeds()))


def format_speeds(speeds: Iterator[SpeedResult]) -> Iterator[str]:
  """A line for each, with the paper's TPUv3 core beside."""
  paper = _read_paper_speeds()
  yield f'{describe_mesh(make_mesh(1, batches={}))}; images a second and largest batch of one; the paper: of a TPUv3 core'
  for each in speeds:
    speed, largest = paper.get((each.model, each.pixels), (None, None))
    beside = f'  paper {speed:9,.1f}  {largest:5,}' if speed else ''
    yield f'{each.model:8} {each.pixels:4} px {each.images_per_second:10,.1f}  {each.largest:5,}{beside}'
