"""Contact sheet: a PNG with an augmented training batch beside an evaluation batch."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.errors import UserError

GRID_COLUMNS = 5
IMAGES_PER_PANEL = GRID_COLUMNS * GRID_COLUMNS

# All sizes are in pixels.
MIN_TILE_SIDE, MAX_TILE_SIDE = 112, 224  # The longer side of an image on the sheet.
TILE_GAP = 14
SHEET_MARGIN = 32
PANEL_GAP = 56
TITLE_FONT_SIZE, DETAIL_FONT_SIZE, LABEL_FONT_SIZE = 22, 14, 14

BACKGROUND_COLOR, TEXT_COLOR = '#ffffff', '#1d1d1f'
MUTED_TEXT_COLOR, BORDER_COLOR = '#77777c', '#c9c9ce'


def write_contact_sheet(
  train_images: np.ndarray,
  train_names: list[str],
  eval_images: np.ndarray,
  eval_names: list[str],
  path: str | Path,
):
  """Write a PNG with the first 25 training and evaluation images and their labels.

  Args:
    train_images: uint8 [n, h, w, 3].
    train_names: The label of each training image.
    eval_images: uint8 [n, h, w, 3].
    eval_names: The label of each evaluation image.
    path: The file to write. Its folder is created.

  Raises UserError if the file cannot be written.
  """
  left = _render_panel('Training', 'with augmentation', train_images, train_names)
  right = _render_panel('Evaluation', 'without augmentation', eval_images, eval_names)
  width = left.width + PANEL_GAP + right.width + 2 * SHEET_MARGIN
  height = max(left.height, right.height) + 2 * SHEET_MARGIN
  sheet = Image.new('RGB', (width, height), BACKGROUND_COLOR)
  sheet.paste(left, (SHEET_MARGIN, SHEET_MARGIN))
  sheet.paste(right, (SHEET_MARGIN + left.width + PANEL_GAP, SHEET_MARGIN))
  try:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, 'PNG')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def _render_panel(title: str, detail: str, images: np.ndarray, names: list[str]) -> Image.Image:
  """Render a heading and a grid of images."""
  h, w = images.shape[1:3]
  tiles = [_resize_tile(image) for image in images[:IMAGES_PER_PANEL]]
  tile_w, tile_h = tiles[0].width + TILE_GAP, tiles[0].height + LABEL_FONT_SIZE + 6 + TILE_GAP
  heading, rows = TITLE_FONT_SIZE + DETAIL_FONT_SIZE + 30, -(-len(tiles) // GRID_COLUMNS)
  size = (GRID_COLUMNS * tile_w - TILE_GAP, heading + rows * tile_h - TILE_GAP)
  panel = Image.new('RGB', size, BACKGROUND_COLOR)
  draw = ImageDraw.Draw(panel)
  draw.text((0, 0), title, TEXT_COLOR, _load_font('DejaVuSans-Bold', TITLE_FONT_SIZE))
  font = _load_font('DejaVuSans', DETAIL_FONT_SIZE)
  count = f'{len(tiles)} of {len(images)}' if len(images) > len(tiles) else f'{len(images)}'
  detail = f'{detail}; {count} images, height {h} and width {w} pixels'
  detail = _truncate_text(draw, detail, font, panel.width)
  draw.text((0, TITLE_FONT_SIZE + 8), detail, MUTED_TEXT_COLOR, font)
  font = _load_font('DejaVuSans', LABEL_FONT_SIZE)
  for i, (tile, name) in enumerate(zip(tiles, names, strict=False)):
    x, y = i % GRID_COLUMNS * tile_w, heading + i // GRID_COLUMNS * tile_h
    panel.paste(tile, (x, y))
    draw.rectangle((x, y, x + tile.width - 1, y + tile.height - 1), outline=BORDER_COLOR)
    label = _truncate_text(draw, name, font, tile.width)
    draw.text((x, y + tile.height + 3), label, TEXT_COLOR, font)
  return panel


def _resize_tile(image: np.ndarray) -> Image.Image:
  """Enlarge a small image by an integer factor, so that each pixel shows, or shrink a large one."""
  h, w = image.shape[:2]
  image = np.repeat(image, 3 // image.shape[2], axis=2)  # Grey images have one channel.
  if max(h, w) <= MAX_TILE_SIDE:
    factor = -(-MIN_TILE_SIDE // max(h, w))
    return Image.fromarray(image).resize((w * factor, h * factor), Image.Resampling.NEAREST)
  size = [max(1, round(side * MAX_TILE_SIDE / max(h, w))) for side in (w, h)]
  return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)


def _truncate_text(
  draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int
) -> str:
  """Shorten a text with an ellipsis until it is at most `width` pixels wide."""
  if draw.textlength(text, font) <= width:
    return text
  while text and draw.textlength(f'{text}…', font) > width:
    text = text[:-1]
  return f'{text}…'


def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
  """Load a DejaVu font, which has most alphabets, from Matplotlib."""
  path = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{name}.ttf'
  return ImageFont.truetype(path, size)
