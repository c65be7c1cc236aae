"""Figures 6 and 14: regions that the class token attends to, by rollout (arXiv 2005.00928).

The attention of each layer is averaged over its heads. The identity is added for the residual
connection, rows are normalized to sum 1. The matrices of all layers are multiplied. Without a class
token, the mean of all tokens takes its place, because the head reads that mean.

Shapes: b images, l layers, h heads, t tokens, n patches of a grid (height, width).
"""

import numpy as np
from PIL import Image, ImageFilter

_PAIRS_PER_ROW = 8  # In Figure 14.


def attention_rollout(attention: np.ndarray) -> np.ndarray:
  """Return the rollout [b, t, t] of attention [b, l, h, t, t].

  Entry [i, j] is the contribution of input token j to output token i.
  """
  mean = np.asarray(attention, np.float64).mean(axis=2)  # [b, l, t, t]
  mixed = mean + np.eye(mean.shape[-1])
  mixed /= mixed.sum(axis=-1, keepdims=True)
  out = mixed[:, 0]
  for layer in range(1, mixed.shape[1]):
    out = mixed[:, layer] @ out
  return out


def rollout_mask(rolled: np.ndarray, grid: tuple[int, int], *, token: bool) -> np.ndarray:
  """Return the rollout over patches [b, height, width], of the class token or of all tokens.

  `rolled` is the rollout [b, t, t]; `token` tells whether token 0 is a class token.
  """
  n = grid[0] * grid[1]
  seen = rolled[:, 0, 1 : n + 1] if token else rolled.mean(axis=1)[:, :n]
  return seen.reshape(-1, *grid)


def shade_image(image: np.ndarray, mask: np.ndarray, *, blur: int) -> np.ndarray:
  """Darken an image, uint8 [H, W, 3], where the mask [height, width] is low, as the authors did.

  The mask is divided by its maximum, enlarged (Lanczos), blurred by `blur` pixels, and stretched to
  [0, 1].
  """
  large = Image.fromarray(np.uint8(255 * mask / mask.max())).resize(
    image.shape[1::-1], Image.Resampling.LANCZOS
  )
  soft = np.asarray(large.filter(ImageFilter.GaussianBlur(blur)), np.float64)
  soft = (soft - soft.min()) / max(np.ptp(soft), 1e-9)
  return np.uint8(np.round(image * soft[..., None]))


def mask_concentration(masks: np.ndarray) -> np.ndarray:
  """Return the mean of the largest tenth of each mask [b, height, width] over the mask's mean.

  It is 1 for uniform attention.
  """
  flat = np.sort(masks.reshape(len(masks), -1), axis=1)
  top = flat[:, -max(1, flat.shape[1] // 10) :].mean(axis=1)
  return top / flat.mean(axis=1)


def rollout_figure_size(images: np.ndarray | None) -> tuple[float, float]:
  """Return the (width, height) of `plot_rollout` in inches."""
  count = 0 if images is None else len(images)
  across = 1 if count <= 3 else min(_PAIRS_PER_ROW, count)
  side = 2.4 if count <= 3 else 0.9
  return 2 * across * side, -(-max(1, count) // across) * side + 0.3


def plot_rollout(figure, pairs: list[tuple[np.ndarray, np.ndarray]]):
  """Plot pairs of an image and its shaded image.

  Up to three pairs are drawn one in a row, as in Figure 6, and more of them eight in a row, as in
  Figure 14.
  """
  across = 1 if len(pairs) <= 3 else min(_PAIRS_PER_ROW, len(pairs))
  axes = figure.subplots(-(-len(pairs) // across), 2 * across, squeeze=False)
  for each in axes.flat:
    each.axis('off')
  for i, (image, shaded) in enumerate(pairs):
    row, place = divmod(i, across)
    axes[row, 2 * place].imshow(image)
    axes[row, 2 * place + 1].imshow(shaded)
    if across > 1:
      axes[row, 2 * place].set_title(i + 1, fontsize=8, loc='left', pad=2)
  if across == 1:
    axes[0, 0].set_title('Input')
    axes[0, 1].set_title('Attention')
