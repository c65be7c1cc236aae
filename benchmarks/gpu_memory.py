"""Compare the peak memory of a training step with timm's, on one GPU with equal batches.

    python benchmarks/gpu_memory.py [--csv FILE] [VARIANT …]
    python benchmarks/gpu_memory.py --smoke

gpu_sides.py says what the sides are. `peak` is what the allocator of each reports. Ours includes
the compilation. `planned` is what the compiler reserves for our step.
"""

import sys

from gpu import parse_arguments, publish
from gpu_sides import available_sides, measure_in_process

from vit_jax.errors import UserError

# Images in a step.
BATCH = {'Ti/16': 2, 'B/16': 128, 'S/16': 256, 'L/16': 64, 'H/14': 32}


def compare(variant: str, *, smoke: bool) -> dict[str, object]:
  """Return a row of the table."""
  batch = BATCH[variant]
  found = {
    side: measure_in_process(side, variant, batch, smoke=smoke) for side in available_sides()
  }
  number = lambda value: f'{value:.2f}' if value else ''
  ours, theirs = (found.get(side) or {} for side in ('ours', 'theirs'))
  mine, others = ours.get('peak_gib'), theirs.get('peak_gib')
  return {
    'model': variant,
    'batch': batch,
    'ratio': number(mine and others and mine / others),
    'ours_peak_gib': number(mine) if ours else 'out of memory',
    'ours_planned_gib': number(ours.get('planned_gib')),
    'timm_peak_gib': 'out of memory' if found.get('theirs', {}) is None else number(others),
    'device': ours.get('device', ''),
    'versions': ', '.join(one['with'] for one in (ours, theirs) if one),
  }


def main():
  """Print the table."""
  args = parse_arguments(__doc__, tuple(BATCH))
  variants = args.variants or (['Ti/16'] if args.smoke else ['B/16', 'S/16', 'L/16', 'H/14'])
  rows = [compare(variant, smoke=args.smoke) for variant in variants]
  publish(rows, args.csv)


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
