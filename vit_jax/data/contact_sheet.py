"""A picture of what the model sees: the augmented training batch beside the evaluation batch, each with its labels."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.errors import UserError

GRID_COLUMNS = 5
IMAGES_PER_PANEL = GRID_COLUMNS * GRID_COLUMNS  # Pictures on each side.
MIN_TILE_SIDE, MAX_TILE_SIDE = 112, 224  # The longer side of a picture on the sheet, in pixels.
TILE_GAP, SHEET_MARGIN, PANEL_GAP = (
  14,
  32,
  56,
)  # Between pictures, around the sheet, between its sides.
TITLE_FONT_SIZE, DETAIL_FONT_SIZE, LABEL_FONT_SIZE = 22, 14, 14  # Sizes of type.
BACKGROUND_COLOR, TEXT_COLOR, MUTED_TEXT_COLOR, BORDER_COLOR = (
  '#ffffff',
  '#1d1d1f',
  '#77777c',
  '#c9c9ce',
)


def write_contact_sheet(
  train_images: np.ndarray,
  train_names: list[str],
  eval_images: np.ndarray,
  eval_names: list[str],
  path: str | Path,
):
  """Writes a PNG: on each side the first 25 images, uint8 [n, h, w, 3], with the name of its label under each."""
  left = _render_panel(
    'Training', 'augmented, as the model learns from it', train_images, train_names
  )
  right = _render_panel('Evaluation', 'as the model is tested on it', eval_images, eval_names)
  size = (
    left.width + PANEL_GAP + right.width + 2 * SHEET_MARGIN,
    max(left.height, right.height) + 2 * SHEET_MARGIN,
  )
  sheet = Image.new('RGB', size, BACKGROUND_COLOR)
  sheet.paste(left, (SHEET_MARGIN, SHEET_MARGIN))
  sheet.paste(right, (SHEET_MARGIN + left.width + PANEL_GAP, SHEET_MARGIN))
  try:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, 'PNG')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def _render_panel(title: str, detail: str, images: np.ndarray, names: list[str]) -> Image.Image:
  """A heading and a grid of pictures."""
  h, w = images.shape[1:3]
  pictures = [_resize_tile(image) for image in images[:IMAGES_PER_PANEL]]
  tile_w, tile_h = pictures[0].width + TILE_GAP, pictures[0].height + LABEL_FONT_SIZE + 6 + TILE_GAP
  heading, rows = TITLE_FONT_SIZE + DETAIL_FONT_SIZE + 30, -(-len(pictures) // GRID_COLUMNS)
  shown = (
    f'{len(pictures)} of {len(images)}' if len(images) > IMAGES_PER_PANEL else f'{len(images)}'
  )
  side = Image.new(
    'RGB', (GRID_COLUMNS * tile_w - TILE_GAP, heading + rows * tile_h - TILE_GAP), BACKGROUND_COLOR
  )
  draw = ImageDraw.Draw(side)
  draw.text((0, 0), title, TEXT_COLOR, _load_font('DejaVuSans-Bold', TITLE_FONT_SIZE))
  font = _load_font('DejaVuSans', DETAIL_FONT_SIZE)
  detail = f'{detail}; {shown} images, {h} pixels high and {w} wide'
  draw.text(
    (0, TITLE_FONT_SIZE + 8), _truncate_text(draw, detail, font, side.width), MUTED_TEXT_COLOR, font
  )
  font = _load_font('DejaVuSans', LABEL_FONT_SIZE)
  for i, (picture, name) in enumerate(zip(pictures, names, strict=False)):
    x, y = i % GRID_COLUMNS * tile_w, heading + i // GRID_COLUMNS * tile_h
    side.paste(picture, (x, y))
    draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=BORDER_COLOR)
    draw.text(
      (x, y + picture.height + 3), _truncate_text(draw, name, font, picture.width), TEXT_COLOR, font
    )
  return side


def _resize_tile(image: np.ndarray) -> Image.Image:
  """Small images grow by a whole factor, so that each pixel shows; large ones shrink."""
  h, w = image.shape[:2]
  if max(h, w) <= MAX_TILE_SIDE:
    factor = -(-MIN_TILE_SIDE // max(h, w))
    return Image.fromarray(image).resize((w * factor, h * factor), Image.Resampling.NEAREST)
  shrunk = lambda side: max(1, round(side * MAX_TILE_SIDE / max(h, w)))
  return Image.fromarray(image).resize((shrunk(w), shrunk(h)), Image.Resampling.LANCZOS)


def _truncate_text(
  draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int
) -> str:
  """The text, cut with an ellipsis where it is too wide."""
  if draw.textlength(text, font) <= width:
    return text
  while text and draw.textlength(f'{text}…', font) > width:
    text = text[:-1]
  return f'{text}…'


def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
  """Matplotlib brings DejaVu, which has the letters of most alphabets."""
  return ImageFont.truetype(
    Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{name}.ttf', size
  )
