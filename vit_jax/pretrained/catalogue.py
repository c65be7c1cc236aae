"""The released checkpoints: released.csv, and augreg's own list of some 50,000 more."""

import csv
import dataclasses
import difflib
import functools
import math
import re
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.pretrained.download import fetch, matches_published_size

AUGREG_URL = 'https://storage.googleapis.com/vit_models/augreg/'
AUGREG_COLUMNS = {  # Those of its list that are read here.
  'name', 'ds', 'final_val', 'filename', 'adapt_ds', 'adapt_resolution', 'adapt_final_test', 'adapt_filename',
}  # fmt: skip
LABELS = {1000: 'imagenet1k', 21843: 'imagenet21k'}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedCheckpoint:
  """One file. '' and None where nothing is known."""

  name: str
  url: str
  size: str = ''  # As published: '393.69 MiB'.
  pixels: int
  classes: int | None = None
  labels: str = ''  # imagenet1k, imagenet21k.
  accuracy: float | None = None  # Expected top-1 on ImageNet's validation split, in percent …
  accuracy_from: str = ''  # … and who says so.
  note: str = ''


@functools.cache
def released_checkpoints() -> dict[str, ReleasedCheckpoint]:
  """released.csv by name."""
  with (Path(__file__).parent / 'released.csv').open(newline='') as file:
    return {row['name']: parse_released_row(row) for row in csv.DictReader(file)}


def parse_released_row(cells: dict[str, str]) -> ReleasedCheckpoint:
  """A line of released.csv."""
  number = lambda name, kind: kind(cells[name]) if cells[name] else None
  typed = {
    'pixels': number('pixels', int),
    'classes': number('classes', int),
    'accuracy': number('accuracy', float),
  }
  return ReleasedCheckpoint(**cells | typed)


def released_names() -> tuple[str, ...]:
  """Every name of released.csv."""
  return tuple(released_checkpoints())


def find_checkpoint(name: str) -> ReleasedCheckpoint | None:
  """The row of that name, or None.

  'augreg/B_16' is the ImageNet-21k checkpoint of that model with the best validation accuracy, and 'augreg/' with any file
  name of augreg's list is that file: for these, and only these, the list is fetched.
  """
  if name in released_checkpoints() or not name.startswith('augreg/'):
    return released_checkpoints().get(name)
  wanted = name.removeprefix('augreg/').removesuffix('.npz')
  with fetch(AUGREG_URL + 'index.csv').open(newline='') as file:
    lines = list(csv.DictReader(file))
  if missing := AUGREG_COLUMNS - set(lines[0] if lines else ()):
    raise UserError(
      f'{AUGREG_URL}index.csv has no column {min(missing)}: delete its copy in the cache, and try again'
    )
  row = best_augreg_checkpoint(wanted, lines) or augreg_checkpoint(wanted, lines)
  return row and released_checkpoints().get(row.name, row)  # Our own row knows the size too.


def best_augreg_checkpoint(model: str, lines: list[dict[str, str]]) -> ReleasedCheckpoint | None:
  """The best ImageNet-21k checkpoint of a model: 'B/16', or 'R26_S_32' as the files write 'R26+S/32'."""
  plain = lambda name: re.sub('[+/]', '_', name)
  same = [line for line in lines if line['ds'] == 'i21k' and plain(line['name']) == plain(model)]
  same = [line for line in same if parse_augreg_number(line['final_val']) is not None]
  return (
    augreg_checkpoint(max(same, key=lambda line: float(line['final_val']))['filename'], lines)
    if same
    else None
  )


def parse_augreg_number(cell: str) -> float | None:
  """The number in a cell of the list; None where it is empty or NaN, as of a run that diverged."""
  number = float(cell or 'nan')
  return None if math.isnan(number) else number


def augreg_checkpoint(file: str, lines: list[dict[str, str]]) -> ReleasedCheckpoint | None:
  """The checkpoint in a file of the list, as it was pre-trained or fine-tuned."""
  row = {'name': f'augreg/{file}', 'url': f'{AUGREG_URL}{file}.npz'}
  for line in lines:
    if line['adapt_filename'] == file:
      on_imagenet = line['adapt_ds'] == 'imagenet2012'
      share = parse_augreg_number(line['adapt_final_test']) if on_imagenet else None
      told = (
        {} if share is None else {'accuracy': 100 * share, 'accuracy_from': "augreg's index.csv"}
      )
      return ReleasedCheckpoint(
        **row,
        **told,
        pixels=int(float(line['adapt_resolution'])),
        labels='imagenet1k' if on_imagenet else '',
      )
    if line['filename'] == file:
      return ReleasedCheckpoint(
        **row, pixels=224, labels='imagenet1k' if line['ds'] == 'i1k' else 'imagenet21k'
      )
  return None


def find_checkpoint_of_file(path: Path) -> ReleasedCheckpoint | None:
  """What the catalogue says of a file that somebody has fetched, known by its name and its published size."""
  same = [
    row
    for row in released_checkpoints().values()
    if row.url.rpartition('/')[2].replace('%2B', '+') == path.name and row.size
  ]
  same = [
    row for row in same if path.is_file() and matches_published_size(path.stat().st_size, row.size)
  ]
  return same[0] if len(same) == 1 else None


def suggest_names(name: str) -> str:
  """What somebody may have meant: the names whose last part holds the last part of `name`, or that are spelt nearly so."""
  plain = lambda text: re.sub(r'[^a-z0-9]', '', text.rpartition('/')[2].lower())
  like = [row for row in released_names() if plain(name) and plain(name) in plain(row)]
  like = like or difflib.get_close_matches(name, released_names(), n=4, cutoff=0.85)
  return f' Did you mean {" or ".join(map(repr, like[:4]))}?' if like else ''
