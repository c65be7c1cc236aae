"""Analyze what a model has learned, as in §4.5 of the paper (arXiv 2010.11929).

Figures 6, 7, 10, 11 and 14, and numbers that distinguish a trained model from an untrained one.
Four modules plot arrays: embedding_filters, position_similarity, attention_distance and
attention_rollout. This module computes the arrays of a model.

Shapes: b images, l layers, h heads, n patches of a grid (height, width), k components.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.outputs import ATTENTION
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.paper import (
  attention_distance,
  attention_rollout,
  embedding_filters,
  position_similarity,
)
from vit_jax.paper.published import read_position_similarities, read_published_table

MAX_FIGURE_IMAGES = 128  # As in the paper.
MAX_ATTENTION_BYTES = 2**28  # Attention weights in memory at a time.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnalysis:
  """The arrays of a model that the figures show; None if the model has none."""

  grid: tuple[int, int]
  filter_components: np.ndarray | None  # [k, h, w, 3]
  explained_variance: np.ndarray | None  # [k], fractions of the total variance
  position_cosines: np.ndarray | None  # [n, n]
  attention_distances: np.ndarray | None  # [l, h], mean over images, in pixels
  uniform_distance: float  # Mean distance of uniform attention, in pixels.
  images: np.ndarray | None  # uint8 [b, H, W, 3]
  rollout_masks: np.ndarray | None  # [b, height, width]


def analyze_model(model, source=None) -> ModelAnalysis:
  """Analyze a Pretrained model, and its attention on the images of `source` if there is one.

  Raises UserError if the model is not a Transformer.
  """
  grid, first = transformer_grid(model), int(model.config.has_class_token)
  kernel = model.params.get('embedding', {}).get('kernel')
  is_rgb = kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 3
  components, variance = (
    embedding_filters.compute_filter_components(kernel) if is_rgb else (None, None)
  )
  stride = tuple(side // places for side, places in zip(model.size, grid, strict=True))
  distances = images = masks = None
  if source is not None:
    images, distances, masks = _analyze_attention(model, source, grid, stride, first)
  return ModelAnalysis(
    grid=grid,
    filter_components=components,
    explained_variance=variance,
    position_cosines=position_cosines(model.params, grid, model.config.prefix_tokens),
    attention_distances=distances,
    uniform_distance=float(attention_distance.patch_distances(grid, stride).mean()),
    images=images,
    rollout_masks=masks,
  )


def transformer_grid(model) -> tuple[int, int]:
  """Return the grid of patches (height, width).

  Raises UserError if the model is not a Transformer.
  """
  if 'Transformer' not in model.params:
    raise UserError(
      f'{model.source} is not a Transformer: it has no attention and no position embeddings'
    )
  return model.grid


def without_distillation_token(attention: np.ndarray, config: ModelConfig) -> np.ndarray:
  """Return the attention weights [..., t, t] without the token after the class token, if any."""
  if not config.distillation_token:
    return attention
  return np.delete(np.delete(attention, 1, axis=-1), 1, axis=-2)


def position_cosines(params: dict, grid: tuple[int, int], first: int) -> np.ndarray | None:
  """Return the cosines [n, n] of the learned position embeddings, or None if there are none."""
  table = params['Transformer'].get('posembed_input', {}).get('pos_embedding')
  if table is None or table.shape[1] not in (first + grid[0] * grid[1], grid[0] * grid[1]):
    return None
  return position_similarity.position_similarity(table[0, -grid[0] * grid[1] :])


def _analyze_attention(
  model, source, grid, stride, first
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return images, mean attention distances [l, h] and rollout masks [b, height, width].

  The images are processed in batches whose attention weights fit MAX_ATTENTION_BYTES.
  """
  tokens = grid[0] * grid[1] + model.config.prefix_tokens + model.config.registers
  shape = model.model.shape
  batch = max(1, MAX_ATTENTION_BYTES // (4 * shape.depth * shape.heads * tokens**2))
  images, distances, masks = [], [], []
  data = eval_data_config(model, batch=min(batch, len(source)), bad_images='error')
  evaluator, params = make_pretrained_evaluator(model, data)
  for rows in evaluator.batches(params, source, ATTENTION):
    weights = without_distillation_token(rows['attention'], model.config)
    images.append(np.repeat(rows['image'], 3 // model.config.channels, axis=-1))
    distances.append(attention_distance.mean_attention_distance(weights, grid, stride, first=first))
    masks.append(
      attention_rollout.rollout_mask(
        attention_rollout.attention_rollout(weights), grid, token=first == 1
      )
    )
  return np.concatenate(images), np.concatenate(distances).mean(axis=0), np.concatenate(masks)


def reinitialize_model(model, seed: int = 0):
  """Return the model with freshly initialized parameters."""
  shape = jax.ShapeDtypeStruct((1, *model.size, model.config.channels), np.uint8)
  init = jax.jit(
    lambda: model.model.init(jax.random.key(seed), np.zeros(shape.shape, shape.dtype))['params']
  )
  return dataclasses.replace(model, params=jax.device_get(init()), source='untrained')


def summarize_analysis(analysis: ModelAnalysis) -> dict[str, float]:
  """Return numbers that distinguish a trained model from an untrained one, by name."""
  out = {}
  if analysis.filter_components is not None:
    out['filters: variance in 28 components'] = float(analysis.explained_variance.sum())
    out['filters: slow waves'] = float(
      embedding_filters.low_frequency_energy(analysis.filter_components).mean()
    )
  if analysis.position_cosines is not None:
    out |= {
      f'positions: cosine, {name}': value
      for name, value in position_similarity.mean_similarities(
        analysis.position_cosines, analysis.grid
      ).items()
    }
  if analysis.attention_distances is not None:
    share = analysis.attention_distances / analysis.uniform_distance
    first, last = share[0], share[-1]
    out |= {
      f'distance: first layer, {what.__name__}': float(what(first))
      for what in (np.min, np.mean, np.max)
    }
    out['distance: last layer, mean'] = float(last.mean())
    out['rollout: largest tenth over mean'] = float(
      attention_rollout.mask_concentration(analysis.rollout_masks).mean()
    )
  return out


def published_summaries() -> dict[str, dict[str, float]]:
  """Return the same numbers of the paper's models.

  They are ViT-L/16 after 14 epochs of JFT-300M, and R50+ViT-L/16 where the paper shows it.
  """
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


def save_figures(analysis: ModelAnalysis, out: Path, *, title: str, blur: int) -> list[Path]:
  """Write each figure as a PNG, and its data, into `out`; return the paths.

  Raises UserError if a file cannot be written.
  """
  figures = {
    'filters': (
      analysis.filter_components,
      (6, 4.4),
      lambda figure: embedding_filters.plot_filters(figure, analysis.filter_components),
    ),
    'positions': (
      analysis.position_cosines,
      (7, 6),
      lambda figure: position_similarity.plot_position_similarity(
        figure, analysis.position_cosines, analysis.grid
      ),
    ),
    'distance': (
      analysis.attention_distances,
      (4.5, 3.6),
      lambda figure: attention_distance.plot_attention_distance(
        figure.subplots(), analysis.attention_distances, title=title
      ),
    ),
    'rollout': (
      analysis.rollout_masks,
      attention_rollout.rollout_figure_size(analysis.images),
      lambda figure: attention_rollout.plot_rollout(figure, _shade_images(analysis, blur)),
    ),
  }
  written = []
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, (present, size, draw) in figures.items():
      if present is not None:
        _save_png(out / f'{name}.png', size, draw)
        written += [out / f'{name}.png', _FIGURE_DATA_WRITERS[name](out, analysis)]
  except OSError as error:
    raise UserError(
      f'{error.filename or out} cannot be written: {error.strerror or error}'
    ) from None
  return written


def _shade_images(analysis: ModelAnalysis, blur: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Return pairs of an image and the image darkened where attention is low."""
  return [
    (image, attention_rollout.shade_image(image, mask, blur=blur))
    for image, mask in zip(analysis.images, analysis.rollout_masks, strict=True)
  ]


def _save_png(path: Path, size: tuple[float, float], draw: Callable):
  """Write a PNG. `size` is (width, height) in inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # Slow to import.
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=100, layout='constrained')
  FigureCanvasAgg(figure)
  draw(figure)
  figure.savefig(path, format='png')


def _save_npz(path: Path, **arrays: np.ndarray) -> Path:
  """Write arrays as an .npz in single precision."""
  np.savez_compressed(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
  return path


def _save_distance_csv(path: Path, distances: np.ndarray) -> Path:
  """Write mean attention distances with the columns of the published Figure 11."""
  lines = [f'{layer},{head},{value:.2f}' for (layer, head), value in np.ndenumerate(distances)]
  path.write_text(
    '\n'.join(['layer,head,mean_attention_distance_px', *lines, '']), encoding='utf-8'
  )
  return path


_FIGURE_DATA_WRITERS: dict[str, Callable[[Path, ModelAnalysis], Path]] = {
  'filters': lambda out, analysis: _save_npz(
    out / 'filters.npz', components=analysis.filter_components, variance=analysis.explained_variance
  ),
  'positions': lambda out, analysis: _save_npz(
    out / 'positions.npz', cosines=analysis.position_cosines
  ),
  'distance': lambda out, analysis: _save_distance_csv(
    out / 'distance.csv', analysis.attention_distances
  ),
  'rollout': lambda out, analysis: _save_npz(out / 'rollout.npz', masks=analysis.rollout_masks),
}
