"""What a model learned, as §4.5 of the paper looks at it (arXiv 2010.11929): Figures 6, 7, 10, 11 and 14, and numbers that tell
a trained model from an untrained one.

filters.py, positions.py, distance.py and rollout.py each make one family of figures from arrays; here they meet a model.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vit_jax.data.loader import eval_batches
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.paper import (
  attention_distance,
  attention_rollout,
  embedding_filters,
  position_similarity,
)
from vit_jax.paper.published import read_position_similarities, read_published_table

MAX_FIGURE_IMAGES = 128  # The paper's.
MAX_ATTENTION_BYTES = 2**28  # Bytes of attention weights that are held at a time.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnalysis:
  """All that the figures show of a model; None where it has no such thing."""

  grid: tuple[int, int]
  components: np.ndarray | None  # [k, h, w, 3]
  variance: np.ndarray | None  # [k], shares of the whole.
  cosines: np.ndarray | None  # [n, n]
  pixels: np.ndarray | None  # [l, h]: mean attention distance.
  uniform: float  # The distance of attention that is everywhere alike.
  images: np.ndarray | None  # uint8 [b, H, W, 3]
  masks: np.ndarray | None  # [b, height, width]


def analyze_model(model, source=None) -> ModelAnalysis:
  """Of a Pretrained, and of what it makes of the images of `source`, if that is given. UserError where it has no attention."""
  grid, first = _transformer_grid(model), int(model.config.pool == 'token')
  kernel = model.params.get('embedding', {}).get('kernel')
  coloured = kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 3
  components, variance = (
    embedding_filters.compute_filter_components(kernel) if coloured else (None, None)
  )
  stride = tuple(side // places for side, places in zip(model.size, grid, strict=True))
  pixels = images = masks = None
  if source is not None:
    images, pixels, masks = _analyze_attention(model, source, grid, stride, first)
  return ModelAnalysis(
    grid=grid,
    components=components,
    variance=variance,
    cosines=_position_cosines(model.params, grid, first),
    pixels=pixels,
    uniform=float(attention_distance.patch_distances(grid, stride).mean()),
    images=images,
    masks=masks,
  )


def _transformer_grid(model) -> tuple[int, int]:
  """Patches (height, width). UserError where the model is no Transformer."""
  if 'Transformer' not in model.params:
    raise UserError(
      f'{model.source} is no Transformer: it has neither attention nor position embeddings to look at'
    )
  return model.grid


def _position_cosines(params: dict, grid: tuple[int, int], first: int) -> np.ndarray | None:
  """Of the learned position embeddings; None where there are none."""
  table = params['Transformer'].get('posembed_input', {}).get('pos_embedding')
  if table is None or table.shape[1] not in (first + grid[0] * grid[1], grid[0] * grid[1]):
    return None
  return position_similarity.position_similarity(table[0, -grid[0] * grid[1] :])


def _analyze_attention(
  model, source, grid, stride, first
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(images, the mean attention distance [l, h], rollout's masks [b, height, width]), a few images at a time."""
  tokens = grid[0] * grid[1] + first + model.config.registers
  shape = model.model.shape
  batch = max(1, MAX_ATTENTION_BYTES // (4 * shape.depth * shape.heads * tokens**2))
  images, pixels, masks = [], [], []
  for part in eval_batches(
    source,
    eval_data_config(model, batch=min(batch, len(source)), bad_images='error'),
    host=0,
    hosts=1,
  ):
    weights = np.asarray(model.attention(part['image']))[part['mask']]
    images.append(part['image'][part['mask']])
    pixels.append(attention_distance.mean_attention_distance(weights, grid, stride, first=first))
    masks.append(
      attention_rollout.rollout_mask(
        attention_rollout.attention_rollout(weights), grid, token=first == 1
      )
    )
  return np.concatenate(images), np.concatenate(pixels).mean(axis=0), np.concatenate(masks)


def reinitialize_model(model, seed: int = 0):
  """The same model as it is before training."""
  shape = jax.ShapeDtypeStruct((1, *model.size, 3), np.uint8)
  init = jax.jit(
    lambda: model.model.init(jax.random.key(seed), np.zeros(shape.shape, shape.dtype))['params']
  )
  return dataclasses.replace(model, params=jax.device_get(init()), source='untrained')


def summarize_analysis(seen: ModelAnalysis) -> dict[str, float]:
  """What tells a trained model from an untrained one, by name."""
  out = {}
  if seen.components is not None:
    out['filters: variance in 28 components'] = float(seen.variance.sum())
    out['filters: slow waves'] = float(
      embedding_filters.low_frequency_energy(seen.components).mean()
    )
  if seen.cosines is not None:
    out |= {
      f'positions: cosine, {name}': value
      for name, value in position_similarity.mean_similarities(seen.cosines, seen.grid).items()
    }
  if seen.pixels is not None:
    share = seen.pixels / seen.uniform
    first, last = share[0], share[-1]
    out |= {
      f'distance: first layer, {what.__name__}': float(what(first))
      for what in (np.min, np.mean, np.max)
    }
    out['distance: last layer, mean'] = float(last.mean())
    out['rollout: largest tenth over mean'] = float(
      attention_rollout.mask_concentration(seen.masks).mean()
    )
  return out


def published_summaries() -> dict[str, dict[str, float]]:
  """The paper's numbers likewise: of ViT-L/16 in 14 epochs of JFT-300M, and of R50+ViT-L/16 where it shows that."""
  rows = [
    (row['model'], int(row['layer']), float(row['mean_attention_distance_px']))
    for row in read_published_table('fig11')
  ]
  uniform = attention_distance.patch_distances((14, 14), (16, 16)).mean()
  out = {}
  for name in dict.fromkeys(model for model, *_ in rows):
    layers = {
      layer: np.array([px for model, at, px in rows if (model, at) == (name, layer)])
      for _, layer, _ in rows
    }
    first, last = layers[0] / uniform, layers[max(layers)] / uniform
    out[name] = {
      f'distance: first layer, {what.__name__}': float(what(first))
      for what in (np.min, np.mean, np.max)
    }
    out[name]['distance: last layer, mean'] = float(last.mean())
  for name, matrix in read_position_similarities().items():
    side = round(len(matrix) ** 0.5)
    out[name] = {
      f'positions: cosine, {what}': value
      for what, value in position_similarity.mean_similarities(matrix, (side, side)).items()
    }
  return out


def save_figures(seen: ModelAnalysis, out: Path, *, title: str, blur: int) -> list[Path]:
  """Writes every figure that there is as PNG into `out`, and its numbers beside it; the files. UserError where that fails."""
  figures = {
    'filters': (
      seen.components,
      (6, 4.4),
      lambda figure: embedding_filters.plot_filters(figure, seen.components),
    ),
    'positions': (
      seen.cosines,
      (7, 6),
      lambda figure: position_similarity.plot_position_similarity(figure, seen.cosines, seen.grid),
    ),
    'distance': (
      seen.pixels,
      (4.5, 3.6),
      lambda figure: attention_distance.plot_attention_distance(
        figure.subplots(), seen.pixels, title=title
      ),
    ),
    'rollout': (
      seen.masks,
      attention_rollout.rollout_figure_size(seen.images),
      lambda figure: attention_rollout.plot_rollout(figure, _shade_images(seen, blur)),
    ),
  }
  written = []
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, (present, size, draw) in figures.items():
      if present is not None:
        _save_png(out / f'{name}.png', size, draw)
        written += [out / f'{name}.png', _FIGURE_DATA_WRITERS[name](out, seen)]
  except OSError as error:
    raise UserError(
      f'{error.filename or out} cannot be written: {error.strerror or error}'
    ) from None
  return written


def _shade_images(seen: ModelAnalysis, blur: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Pairs of an image and the same darkened where nothing is looked at."""
  return [
    (image, attention_rollout.shade_image(image, mask, blur=blur))
    for image, mask in zip(seen.images, seen.masks, strict=True)
  ]


def _save_png(path: Path, size: tuple[float, float], draw: Callable):
  """A PNG of so many inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # Slow to import.
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=100, layout='constrained')
  FigureCanvasAgg(figure)
  draw(figure)
  figure.savefig(path, format='png')


def _save_npz(path: Path, **arrays: np.ndarray) -> Path:
  """An .npz in single precision."""
  np.savez_compressed(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
  return path


def _save_distance_csv(path: Path, pixels: np.ndarray) -> Path:
  """The columns of the paper's Figure 11 in published.py."""
  lines = [f'{layer},{head},{value:.2f}' for (layer, head), value in np.ndenumerate(pixels)]
  path.write_text(
    '\n'.join(['layer,head,mean_attention_distance_px', *lines, '']), encoding='utf-8'
  )
  return path


_FIGURE_DATA_WRITERS: dict[str, Callable[[Path, ModelAnalysis], Path]] = {
  'filters': lambda out, seen: _save_npz(
    out / 'filters.npz', components=seen.components, variance=seen.variance
  ),
  'positions': lambda out, seen: _save_npz(out / 'positions.npz', cosines=seen.cosines),
  'distance': lambda out, seen: _save_distance_csv(out / 'distance.csv', seen.pixels),
  'rollout': lambda out, seen: _save_npz(out / 'rollout.npz', masks=seen.masks),
}
