"""Figures 6 and 14: where in the image the class token looks, by attention rollout (arXiv 2005.00928).

The attention of each layer is averaged over its heads, the identity added for the residual connection, rows scaled to sum 1,
and the matrices of all layers multiplied. Without a class token it is the mean of all tokens that looks, which is what the head
then reads. Shapes: b images, l layers, h heads, t tokens, n patches of a grid (height, width).
"""

import numpy as np
from PIL import Image, ImageFilter

_PAIRS_PER_ROW = 8  # Pairs in a row of Figure 14.


def attention_rollout(attention: np.ndarray) -> np.ndarray:
  """Attention [b, l, h, t, t] -> how much of each token (last axis) is in each token of the last layer [b, t, t]."""
  mean = np.asarray(attention, np.float64).mean(axis=2)  # [b, l, t, t]
  mixed = mean + np.eye(mean.shape[-1])
  mixed /= mixed.sum(axis=-1, keepdims=True)
  out = mixed[:, 0]
  for layer in range(1, mixed.shape[1]):
    out = mixed[:, layer] @ out
  return out


def rollout_mask(rolled: np.ndarray, grid: tuple[int, int], *, token: bool) -> np.ndarray:
  """`attention_rollout` [b, t, t] -> what is looked at [b, height, width]: by the class token, or by the mean of all tokens."""
  n = grid[0] * grid[1]
  seen = rolled[:, 0, 1 : n + 1] if token else rolled.mean(axis=1)[:, :n]
  return seen.reshape(-1, *grid)


def shade_image(image: np.ndarray, mask: np.ndarray, *, blur: int) -> np.ndarray:
  """The image, uint8 [H, W, 3], darkened where the mask [height, width] is low: as the paper's first author drew it.

  The mask over its largest number, enlarged (Lanczos), blurred by `blur` pixels, and stretched from 0 to 1.
  """
  large = Image.fromarray(np.uint8(255 * mask / mask.max())).resize(
    image.shape[1::-1], Image.Resampling.LANCZOS
  )
  soft = np.asarray(large.filter(ImageFilter.GaussianBlur(blur)), np.float64)
  soft = (soft - soft.min()) / max(np.ptp(soft), 1e-9)
  return np.uint8(np.round(image * soft[..., None]))


def mask_concentration(masks: np.ndarray) -> np.ndarray:
  """How many times the mean the largest tenth of each mask [b, height, width] is: 1 where it looks everywhere alike."""
  flat = np.sort(masks.reshape(len(masks), -1), axis=1)
  top = flat[:, -max(1, flat.shape[1] // 10) :].mean(axis=1)
  return top / flat.mean(axis=1)


def rollout_figure_size(images: np.ndarray | None) -> tuple[float, float]:
  """Inches that `plot_rollout` wants for so many images."""
  count = 0 if images is None else len(images)
  across = 1 if count <= 3 else min(_PAIRS_PER_ROW, count)
  side = 2.4 if count <= 3 else 0.9
  return 2 * across * side, -(-max(1, count) // across) * side + 0.3


def plot_rollout(figure, pairs: list[tuple[np.ndarray, np.ndarray]]):
  """Pairs of an image and what `shade_image` made of it: three as Figure 6 has them, one a row; more as Figure 14, eight in a row."""
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
