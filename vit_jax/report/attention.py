"""The attention explorer: where each head of each layer looks from each patch of some images.

Weights between patches are stored as bytes: 255 is the largest weight of a head from a patch.
They are compressed (zlib); the browser decompresses them. If the images do not fit the page, the
weights are averaged over blocks of patches.

Shapes: b images, l layers, h heads, q queries (patches, after the class token if there is one),
n patches of a grid (height, width), t tokens.
"""

import base64
import dataclasses
import zlib

import numpy as np
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.outputs import ATTENTION
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.paper.attention_distance import mean_attention_distance
from vit_jax.paper.attention_rollout import attention_rollout, rollout_mask, shade_image
from vit_jax.paper.figures import (
  position_cosines,
  transformer_grid,
  without_distillation_token,
)
from vit_jax.paper.position_similarity import tile_similarity_maps
from vit_jax.report.thumbnails import encode_file, encode_image

MAX_IMAGES = 6
MAX_COMPRESSED_BYTES = 3 * 2**20  # Of all weights: 4 MB of the page as base64.
_MIN_IMAGES = 2  # Coarser blocks are used until as many fit.
_MAX_WEIGHT_BYTES = 2**30  # Of one image, in memory.
_IMAGE_SIDE = 320  # Pixels.
_POSITION_SIDE = 480


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionImage:
  """An image of the explorer."""

  caption: str
  picture: str  # Data URI.
  rollout: str  # Data URI: the image, darkened where the rollout is low.
  weights: str  # Base64 of compressed uint8 [l, h, q, n].


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSection:
  """The section about attention. `None` means that a part does not apply."""

  grid: tuple[int, int]  # Of the weights of the explorer.
  block: int  # Side of a block of patches whose weights are averaged.
  layers: int
  heads: int
  has_class_token: bool
  images: list[AttentionImage]
  distances: np.ndarray  # [l, h], in pixels.
  positions: str | None  # Data URI of the similarity of position embeddings.


def analyze_attention(model, source, captions: list[str]) -> AttentionSection | None:
  """Return the section for a `PretrainedModel` and the images of `source`.

  Returns None for a model without attention between all patches, such as a ResNet, and if the
  weights do not fit.
  """
  try:
    grid = transformer_grid(model)
  except UserError:
    return None
  if 'encoderblock' not in model.params['Transformer'] or model.config.variant.startswith('Axial'):
    return None
  shape, first = model.model.shape, int(model.config.has_class_token)
  tokens = grid[0] * grid[1] + model.config.prefix_tokens + model.config.registers
  if 4 * shape.depth * shape.heads * tokens**2 > _MAX_WEIGHT_BYTES:
    return None
  data = eval_data_config(model, batch=1)
  evaluator, params = make_pretrained_evaluator(model, data)
  raw, distances = [], []
  for rows in evaluator.batches(params, source, ATTENTION):
    stride = tuple(side // places for side, places in zip(model.size, grid, strict=True))
    attention = without_distillation_token(rows['attention'], model.config)
    distances.append(mean_attention_distance(attention, grid, stride, first=first))
    for weights, image in zip(attention, rows['image'], strict=True):
      raw.append((image, patch_weights(weights, grid, first), _roll_out(weights, grid, first)))
  block, kept = compress_to_fit([weights for _, weights, _ in raw], grid, first)
  blur = max(shape.stride)
  return AttentionSection(
    grid=tuple(-(-side // block) for side in grid),
    block=block,
    layers=shape.depth,
    heads=shape.heads,
    has_class_token=bool(first),
    images=[
      AttentionImage(
        caption=caption,
        picture=encode_image(image, _IMAGE_SIDE),
        rollout=encode_image(_shade(image, mask, blur), _IMAGE_SIDE),
        weights=base64.b64encode(weights).decode(),
      )
      for (image, _, mask), weights, caption in zip(raw, kept, captions, strict=False)
    ],
    distances=np.concatenate(distances).mean(axis=0),
    positions=draw_position_similarity(model, grid, model.config.prefix_tokens),
  )


def patch_weights(attention: np.ndarray, grid: tuple[int, int], first: int) -> np.ndarray:
  """Return the weights [l, h, q, n] on patches of attention [l, h, t, t], without registers.

  `first` is 1 if a class token precedes the patches, else 0. Its query is the first, then.
  """
  n = grid[0] * grid[1]
  return np.asarray(attention[:, :, : first + n, first : first + n], np.float32)


def coarsen(weights: np.ndarray, grid: tuple[int, int], first: int, block: int) -> np.ndarray:
  """Return weights [l, h, q, n] for blocks of patches: means over queries, sums over keys.

  A grid that blocks do not divide has smaller ones at its right and lower edge.
  """
  if block == 1:
    return weights
  h, w = grid
  rows, columns = -(-h // block), -(-w // block)
  of_patch = (np.arange(h)[:, None] // block * columns + np.arange(w) // block).ravel()
  member = (of_patch[:, None] == np.arange(rows * columns)).astype(np.float32)  # [n, blocks]
  keys = weights @ member
  patches = np.einsum('lhqn,qm->lhmn', keys[:, :, first:], member / member.sum(axis=0))
  return np.concatenate([keys[:, :, :first], patches], axis=2)


def quantize(weights: np.ndarray) -> np.ndarray:
  """Return uint8 weights [..., n] in units of 1/255 of the largest of the last axis."""
  largest = weights.max(axis=-1, keepdims=True)
  return np.uint8(np.round(255 * weights / np.maximum(largest, 1e-12)))


def compress_to_fit(
  weights: list[np.ndarray], grid: tuple[int, int], first: int
) -> tuple[int, list[bytes]]:
  """Return (the side of a block, the compressed weights of the images that fit the page).

  The block is the smallest with which two images fit, or all if there are fewer.
  """
  for block in range(1, max(grid) + 1):
    kept, left = [], MAX_COMPRESSED_BYTES
    for each in weights:
      data = zlib.compress(quantize(coarsen(each, grid, first, block)).tobytes(), 6)
      left -= len(data)
      if left < 0:
        break
      kept.append(data)
    if len(kept) >= min(_MIN_IMAGES, len(weights)):
      return block, kept
  return max(grid), []


def draw_position_similarity(model, grid: tuple[int, int], first: int) -> str | None:
  """Return a picture of the cosines of learned position embeddings, or None without them."""
  cosines = position_cosines(model.params, grid, first)
  if cosines is None:
    return None
  from matplotlib import colormaps

  tiles = tile_similarity_maps(cosines, grid)[:-1, :-1]
  colors = colormaps['viridis']((tiles + 1) / 2)
  colors[np.isnan(tiles)] = 0  # Gaps are transparent.
  picture = Image.fromarray(np.uint8(255 * colors))
  factor = max(1, _POSITION_SIDE // max(picture.size))
  return encode_file(
    picture.resize([factor * side for side in picture.size], Image.Resampling.NEAREST), 'png'
  )


def _roll_out(attention: np.ndarray, grid: tuple[int, int], first: int) -> np.ndarray:
  """Return the rollout mask [height, width] of attention [l, h, t, t]."""
  return rollout_mask(attention_rollout(attention[None]), grid, token=first == 1)[0]


def _shade(image: np.ndarray, mask: np.ndarray, blur: int) -> np.ndarray:
  """Return the image in color, darkened where the mask is low."""
  return shade_image(np.repeat(image, 3 // image.shape[-1], axis=-1), mask, blur=blur)
