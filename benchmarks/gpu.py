"""Compare training on one GPU with timm's same model, in images per second.

    python benchmarks/gpu.py [--csv FILE] [VARIANT …]     B/16, S/16, L/16 and H/14
    python benchmarks/gpu.py --smoke                      a tiny model, on any machine

gpu_sides.py says what the sides are. Each takes its best batch: sizes are tried in ascending order
until a side is no faster, or out of memory. The sides then alternate, each in its own
process. Seconds are medians over all turns. MFU counts 3 times the FLOPs of `Shape.flops`.

FILE gets the table, and FILE.measured the measurements as they are made. A measurement that is
there is not repeated, so that an interrupted comparison continues.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gpu_sides import TIMM, available_sides, measure_in_process

from vit_jax.cli.results import format_csv
from vit_jax.errors import UserError
from vit_jax.runtime.files import write_atomically

# Images in a step, to choose from.
BATCHES = {
  'Ti/16': (256, 512, 1024),
  'S/16': (256, 512, 1024),
  'B/16': (128, 256, 512),
  'L/16': (64, 128, 256),
  'H/14': (32, 64, 128),
}
SMOKE_BATCHES = (2,)
TURNS = 2
FASTER = 1.01  # A batch that is faster by less ends the search.
Measure = Callable[..., dict | None]


def measured_once(path: Path | None, *, smoke: bool) -> Measure:
  """Return a function that measures (side, variant, batch, use), each once, and records it."""
  lines = path.read_text(encoding='utf-8').splitlines() if path and path.exists() else []
  known = {tuple(key): found for key, found in map(json.loads, lines)}

  def measure(*key) -> dict | None:
    if key not in known:
      known[key] = measure_in_process(*key[:3], smoke=smoke)
      speed = f'{images_per_second(known[key], key[2]):.1f} images/s' if known[key] else 'no memory'
      print(*key, speed, file=sys.stderr, flush=True)
      if path:
        with path.open('a', encoding='utf-8') as file:
          file.write(json.dumps([key, known[key]]) + '\n')
    return known[key]

  return measure


def images_per_second(found: dict, batch: int) -> float:
  """Return the images per second of a measurement."""
  return batch / float(np.median(found['seconds']))


def best_batch(measure: Measure, side: str, variant: str, batches: tuple[int, ...]) -> int:
  """Return the batch at which a side is fastest. Raises UserError if the smallest does not fit."""
  best, speed = 0, 0.0
  for batch in batches:
    found = measure(side, variant, batch, 'search')
    if found is None or images_per_second(found, batch) < FASTER * speed:
      break
    best, speed = batch, images_per_second(found, batch)
  if not best:
    raise UserError(f'{variant}: {side} runs out of memory with {batches[0]} images')
  return best


def compare(measure: Measure, variant: str, *, smoke: bool) -> dict[str, object]:
  """Return a row of the table. Without timm, its columns are empty."""
  sides, found = available_sides(), {}
  batches = SMOKE_BATCHES if smoke else BATCHES[variant]
  best = {
    side: best_batch(measure, side, variant, batches) if len(batches) > 1 else batches[0]
    for side in sides
  }
  for turn in range(1 if smoke else TURNS):
    for side in sides:
      one = measure(side, variant, best[side], f'turn {turn}')
      if one is None:
        raise UserError(f'{variant}: {side} runs out of memory with {best[side]} images')
      before = found.get(side, {}).get('seconds', [])
      found[side] = one | {'seconds': before + one['seconds']}
  return row(variant, best, found)


def row(variant: str, batch: dict[str, int], found: dict[str, dict]) -> dict[str, object]:
  """Return {column: value} of a model."""
  speed = {side: images_per_second(one, batch[side]) for side, one in found.items()}
  a_image = found['ours']['flops'] / batch['ours']
  peak = found['ours']['peak_flops']
  both = 'theirs' in found
  columns = {'model': variant, 'ratio': f'{speed["ours"] / speed["theirs"]:.3f}' if both else ''}
  for side, name in (('ours', 'ours'), ('theirs', 'timm')):
    one = found.get(side, {})
    columns |= {
      f'{name}_batch': batch.get(side, ''),
      f'{name}_images_per_second': f'{speed[side]:.1f}' if one else '',
      f'{name}_mfu': f'{a_image * speed[side] / peak:.4f}' if one and peak else '',
      f'{name}_peak_gib': f'{one["peak_gib"]:.2f}' if one.get('peak_gib') else '',
      f'{name}_compile_seconds': f'{one["compile_seconds"]:.0f}' if one else '',
    }
  versions = ', '.join(one['with'] for one in found.values())
  return columns | {'device': found['ours']['device'], 'versions': versions}


def write_rows(path: Path, rows: list[dict[str, object]]):
  """Write rows with the same columns as CSV."""
  write_atomically(path, format_csv([list(rows[0]), *(list(each.values()) for each in rows)]))


def publish(rows: list[dict[str, object]], path: Path | None):
  """Print rows as a table, and write them as CSV to `path` if it is given."""
  if path:
    write_rows(path, rows)
  print(markdown(rows))


def markdown(rows: list[dict[str, object]]) -> str:
  """Return rows as a table for the documentation."""
  line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
  return '\n'.join([line(rows[0]), line('-' for _ in rows[0]), *(line(r.values()) for r in rows)])


def parse_arguments(description: str, names: tuple[str, ...]) -> argparse.Namespace:
  """Return the arguments of a script that has a row for each model."""
  top = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('--csv', type=Path, metavar='FILE', help='write the table to FILE')
  top.add_argument('--smoke', action='store_true', help='a tiny size, on any machine')
  top.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(names))
  args = top.parse_args()
  if wrong := set(args.variants) - set(names):
    raise UserError(f'{min(wrong)}: expected {", ".join(names)}')
  return args


def main():
  """Print the table."""
  args = parse_arguments(__doc__, tuple(TIMM))
  path = args.csv and args.csv.with_name(f'{args.csv.name}.measured')
  compare_one = functools.partial(compare, measured_once(path, smoke=args.smoke), smoke=args.smoke)
  variants = args.variants or (['Ti/16'] if args.smoke else ['B/16', 'S/16', 'L/16', 'H/14'])
  rows = [compare_one(variant) for variant in variants]
  publish(rows, args.csv)


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
