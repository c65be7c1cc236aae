"""Look up released checkpoints, in released.csv and in AugReg's own list of some 50,000 more."""

import csv
import dataclasses
import difflib
import functools
import math
import re
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.pretrained.download import fetch
from vit_jax.pretrained.published_size import matches_published_size

# The licence of google-research/vision_transformer, big_transfer and big_vision, the repositories
# that released the files of released.csv and of AugReg's list.
REPOSITORY_LICENCE = 'Apache-2.0'
AUGREG_URL = 'https://storage.googleapis.com/vit_models/augreg/'
# The columns of AugReg's index.csv that this module reads.
AUGREG_COLUMNS = {
  'name', 'ds', 'final_val', 'filename',
  'adapt_ds', 'adapt_resolution', 'adapt_final_test', 'adapt_filename',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedCheckpoint:
  """A released file. The fields are the columns of released.csv; '' and None mean unknown."""

  name: str
  url: str
  size: str = ''  # File size as published: '393.69 MiB'.
  pixels: int  # Side of the square image.
  classes: int | None = None
  labels: str = ''  # 'imagenet1k' or 'imagenet21k'.
  accuracy: float | None = None  # Expected top-1 on ImageNet's validation split, in percent.
  accuracy_from: str = ''  # The source of the accuracy.
  note: str = ''


@functools.cache
def released_checkpoints() -> dict[str, ReleasedCheckpoint]:
  """Return the checkpoints of released.csv by name."""
  with (Path(__file__).parent / 'released.csv').open(newline='', encoding='utf-8') as file:
    return {row['name']: parse_released_row(row) for row in csv.DictReader(file)}


def parse_released_row(cells: dict[str, str]) -> ReleasedCheckpoint:
  """Convert a row of released.csv."""
  types = {'pixels': int, 'classes': int, 'accuracy': float}
  numbers = {name: kind(cells[name]) if cells[name] else None for name, kind in types.items()}
  return ReleasedCheckpoint(**cells | numbers)


def find_checkpoint(name: str) -> ReleasedCheckpoint | None:
  """Return the checkpoint with this name, or None.

  'augreg/B_16' is the ImageNet-21k checkpoint of B/16 with the best validation accuracy. 'augreg/'
  followed by a file name of AugReg's list is that file. Only names that start with 'augreg/'
  download the list.

  Raises UserError if the list lacks a column.
  """
  released = released_checkpoints()
  if name in released or not name.startswith('augreg/'):
    return released.get(name)
  model_or_file = name.removeprefix('augreg/').removesuffix('.npz')
  with fetch(AUGREG_URL + 'index.csv').open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  if missing := AUGREG_COLUMNS - set(rows[0] if rows else ()):
    raise UserError(
      f'{AUGREG_URL}index.csv has no column {min(missing)}: delete the cached copy and try again'
    )
  checkpoint = best_augreg_checkpoint(model_or_file, rows) or augreg_checkpoint(model_or_file, rows)
  # The entry of released.csv also has the file size.
  return checkpoint and released.get(checkpoint.name, checkpoint)


def best_augreg_checkpoint(model: str, rows: list[dict[str, str]]) -> ReleasedCheckpoint | None:
  """Return the ImageNet-21k checkpoint of a model with the best validation accuracy, or None.

  `model` is 'B/16', or 'R26_S_32' for 'R26+S/32' as in file names.
  """

  def normalize(name: str) -> str:
    return re.sub('[+/]', '_', name)

  def accuracy(row: dict[str, str]) -> float:
    value = parse_augreg_number(row['final_val'])
    return -math.inf if value is None else value

  candidates = [
    row for row in rows if row['ds'] == 'i21k' and normalize(row['name']) == normalize(model)
  ]
  best = max(candidates, key=accuracy, default=None)
  if best is None or accuracy(best) == -math.inf:
    return None
  return augreg_checkpoint(best['filename'], rows)


def parse_augreg_number(cell: str) -> float | None:
  """Return the number in a cell, or None if it is empty or NaN, as for a run that diverged."""
  number = float(cell or 'nan')
  return None if math.isnan(number) else number


def augreg_checkpoint(file: str, rows: list[dict[str, str]]) -> ReleasedCheckpoint | None:
  """Return the pre-trained or fine-tuned checkpoint with this file name, or None."""
  name, url = f'augreg/{file}', f'{AUGREG_URL}{file}.npz'
  for row in rows:
    if row['adapt_filename'] == file:
      on_imagenet = row['adapt_ds'] == 'imagenet2012'
      accuracy = parse_augreg_number(row['adapt_final_test']) if on_imagenet else None
      return ReleasedCheckpoint(
        name=name,
        url=url,
        pixels=int(float(row['adapt_resolution'])),
        labels='imagenet1k' if on_imagenet else '',
        accuracy=None if accuracy is None else 100 * accuracy,
        accuracy_from='' if accuracy is None else "augreg's index.csv",
      )
    if row['filename'] == file:
      labels = 'imagenet1k' if row['ds'] == 'i1k' else 'imagenet21k'
      return ReleasedCheckpoint(name=name, url=url, pixels=224, labels=labels)
  return None


def find_checkpoint_of_file(path: Path) -> ReleasedCheckpoint | None:
  """Return the only checkpoint with the name and the published size of a local file, or None."""
  if not path.is_file():
    return None
  matches = [
    checkpoint
    for checkpoint in released_checkpoints().values()
    if checkpoint.url.rpartition('/')[2].replace('%2B', '+') == path.name
    and checkpoint.size
    and matches_published_size(path.stat().st_size, checkpoint.size)
  ]
  return matches[0] if len(matches) == 1 else None


def suggest_names(name: str) -> str:
  """Return ' Did you mean …?' with up to four similar names of released.csv, or ''.

  A name is similar if its last part contains the last part of `name`, or if it is spelled alike.
  """

  def normalize(text: str) -> str:
    return re.sub(r'[^a-z0-9]', '', text.rpartition('/')[2].lower())

  part, names = normalize(name), list(released_checkpoints())
  similar = [candidate for candidate in names if part and part in normalize(candidate)]
  similar = similar or difflib.get_close_matches(name, names, n=4, cutoff=0.85)
  return f' Did you mean {" or ".join(map(repr, similar[:4]))}?' if similar else ''
