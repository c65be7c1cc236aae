"""A picture of what the model sees: the augmented training batch beside the evaluation batch, each with its labels."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.errors import UserError

COLUMNS = 5
MOST = COLUMNS * COLUMNS  # Pictures on each side.
SMALLEST, LARGEST = 112, 224  # The longer side of a picture on the sheet, in pixels.
GAP, MARGIN, MIDDLE = 14, 32, 56  # Between pictures, around the sheet, between its sides.
TITLE, DETAIL, LABEL = 22, 14, 14  # Sizes of type.
PAPER, INK, FAINT, EDGE = '#ffffff', '#1d1d1f', '#77777c', '#c9c9ce'


def contact_sheet(
  train_images: np.ndarray,
  train_names: list[str],
  eval_images: np.ndarray,
  eval_names: list[str],
  path: str | Path,
):
  """Writes a PNG: on each side the first 25 images, uint8 [n, h, w, 3], with the name of its label under each."""
  left = _side('Training', 'augmented, as the model learns from it', train_images, train_names)
  right = _side('Evaluation', 'as the model is tested on it', eval_images, eval_names)
  size = left.width + MIDDLE + right.width + 2 * MARGIN, max(left.height, right.height) + 2 * MARGIN
  sheet = Image.new('RGB', size, PAPER)
  sheet.paste(left, (MARGIN, MARGIN))
  sheet.paste(right, (MARGIN + left.width + MIDDLE, MARGIN))
  try:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, 'PNG')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def _side(title: str, detail: str, images: np.ndarray, names: list[str]) -> Image.Image:
  """A heading and a grid of pictures."""
  h, w = images.shape[1:3]
  pictures = [_picture(image) for image in images[:MOST]]
  tile_w, tile_h = pictures[0].width + GAP, pictures[0].height + LABEL + 6 + GAP
  heading, rows = TITLE + DETAIL + 30, -(-len(pictures) // COLUMNS)
  shown = f'{len(pictures)} of {len(images)}' if len(images) > MOST else f'{len(images)}'
  side = Image.new('RGB', (COLUMNS * tile_w - GAP, heading + rows * tile_h - GAP), PAPER)
  draw = ImageDraw.Draw(side)
  draw.text((0, 0), title, INK, _font('DejaVuSans-Bold', TITLE))
  font = _font('DejaVuSans', DETAIL)
  detail = f'{detail}; {shown} images, {h} pixels high and {w} wide'
  draw.text((0, TITLE + 8), _fitted(draw, detail, font, side.width), FAINT, font)
  font = _font('DejaVuSans', LABEL)
  for i, (picture, name) in enumerate(zip(pictures, names, strict=False)):
    x, y = i % COLUMNS * tile_w, heading + i // COLUMNS * tile_h
    side.paste(picture, (x, y))
    draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=EDGE)
    draw.text((x, y + picture.height + 3), _fitted(draw, name, font, picture.width), INK, font)
  return side


def _picture(image: np.ndarray) -> Image.Image:
  """Small images grow by a whole factor, so that each pixel shows; large ones shrink."""
  h, w = image.shape[:2]
  if max(h, w) <= LARGEST:
    factor = -(-SMALLEST // max(h, w))
    return Image.fromarray(image).resize((w * factor, h * factor), Image.Resampling.NEAREST)
  shrunk = lambda side: max(1, round(side * LARGEST / max(h, w)))
  return Image.fromarray(image).resize((shrunk(w), shrunk(h)), Image.Resampling.LANCZOS)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
  """The text, cut with an ellipsis where it is too wide."""
  if draw.textlength(text, font) <= width:
    return text
  while text and draw.textlength(f'{text}…', font) > width:
    text = text[:-1]
  return f'{text}…'


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  """Matplotlib brings DejaVu, which has the letters of most alphabets."""
  return ImageFont.truetype(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{name}.ttf', size)
