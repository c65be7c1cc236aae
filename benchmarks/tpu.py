"""Estimate the cost of a training step on TPUs without a TPU: cycles, memory and network bytes.

    python benchmarks/tpu.py [--slices v5e:2x2 …] [--loop] [--xla] [--out FILE] [VARIANT@SIDE …]

The estimates are those of the command `plan`. The step is that of configs/bench.py on four chips,
data parallel; g/14 has its parameters sharded over the four. The images for each chip are those
below, or a half, a quarter, … of them: the first that fits. `--loop` compiles the blocks as a loop
with remat='vit', in a tenth of the time, which gives another program. `--xla` adds each row without
our attention kernel. Rows that the CSV FILE already has are skipped.
"""

import argparse
import csv
import os
import sys
from importlib.metadata import version
from pathlib import Path

from vit_jax.cli.plan import QUIET_TPU_ENVIRONMENT
from vit_jax.cli.results import report_elapsed_time

ROOT = Path(__file__).parents[1]
SLICES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
# Images a chip, and devices that share the parameters.
CASES = {
  'S/16@224': (256, 1), 'B/16@224': (128, 1), 'L/16@224': (32, 1), 'H/14@224': (16, 1),
  'g/14@224': (16, 4),
  'B/16@384': (32, 1), 'L/16@384': (8, 1),
}  # fmt: skip
BLOCKS = {'unrolled': {'model.unroll': 0}, 'looped': {'model.unroll': 1, 'model.remat': 'vit'}}
# Parameters, then results.
ASKED = ('model', 'slice', 'blocks', 'attention')
FOUND = (
  'images a chip',
  'M cycles',
  'ms',
  'MFU %',
  'GiB',
  'network MB',
  'compiled in s',
  'versions',
)


def rows(
  cases: list[str], slices: list[str], *, blocks: str, attentions: list[str]
) -> list[tuple[str, ...]]:
  """Return the parameters of each row, the cheap rows first."""
  return [
    (case, where, blocks, attention)
    for case in cases
    for where in slices
    for attention in attentions
  ]


def measure(case: str, where: str, blocks: str, attention: str) -> dict[str, str]:
  """Compile and measure one row."""
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.tpu.plan import plan_run
  from vit_jax.tpu.topologies import parse_topology

  (variant, side), (images, fsdp), place = case.split('@'), CASES[case], parse_topology(where)
  changed = {
    'data.size': f'{side},{side}',
    'mesh.fsdp': fsdp,
    'model.attention': attention,
  } | BLOCKS[blocks]
  while True:
    settings = [
      f'--config.{name}={value}'
      for name, value in (changed | {'data.batch': images * place.chips}).items()
    ]
    config = parse_config_flags([f'--config={ROOT / "configs" / "bench.py"}:{variant}', *settings])
    with report_elapsed_time(f'compiling {case} for {where}, {images} images a chip'):
      found, _ = plan_run(config, place)
    if found.fits or images == 1:
      break
    images //= 2
  asked = dict(zip(ASKED, (case, where, blocks, attention), strict=True))
  return asked | {'images a chip': f'{images}'} | in_numbers(found)


def in_numbers(found) -> dict[str, str]:
  """Return the columns of a plan; for one that does not fit, its size."""
  numbers = {
    'GiB': f'{found.hbm / 2**30:.2f}',
    'compiled in s': f'{found.compile_seconds:.0f}',
    'versions': f'jax {version("jax")}, libtpu {version("libtpu")}',
  }
  if not found.fits:
    return numbers
  return numbers | {
    'M cycles': f'{found.cycles / 1e6:.1f}',
    'ms': f'{1000 * found.seconds_per_step:.1f}',
    'MFU %': f'{100 * found.mfu:.0f}',
    'network MB': f'{sum(found.collectives.values()) / 1e6:.0f}',
  }


def known(file: Path | None) -> dict[tuple[str, ...], dict[str, str]]:
  """Return the rows of the CSV by their parameters."""
  if file is None or not file.exists():
    return {}
  with file.open(newline='', encoding='utf-8') as lines:
    return {tuple(row[name] for name in ASKED): row for row in csv.DictReader(lines)}


def append(file: Path | None, row: dict[str, str]):
  """Append a row, after a header if the file is new."""
  if file is None:
    return
  first = not file.exists()
  with file.open('a', newline='', encoding='utf-8') as lines:
    writer = csv.DictWriter(lines, (*ASKED, *FOUND))
    if first:
      writer.writeheader()
    writer.writerow(row)


def main():
  """Write the table, one row at a time."""
  args = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  args.add_argument('--slices', nargs='+', default=SLICES, metavar='SLICE', help='such as v5e:2x2')
  args.add_argument('--loop', action='store_true', help='the blocks as a loop')
  args.add_argument('--xla', action='store_true', help='beside them, without the kernel')
  args.add_argument(
    '--out', type=Path, metavar='FILE', help='rows are read from it and added to it'
  )
  args.add_argument(
    'cases', nargs='*', default=list(CASES), metavar='VARIANT@SIDE', help=' or '.join(CASES)
  )
  args = args.parse_args()
  if unknown := set(args.cases) - set(CASES):
    sys.exit(f'{", ".join(unknown)}: there is {", ".join(CASES)}')
  os.environ |= QUIET_TPU_ENVIRONMENT  # Before jax is imported.
  there, columns = known(args.out), (*ASKED, *FOUND)
  print('| ' + ' | '.join(columns) + ' |\n|' + '---|' * len(columns))
  attentions = ['auto', 'xla'] if args.xla else ['auto']
  for asked in rows(
    args.cases, args.slices, blocks='looped' if args.loop else 'unrolled', attentions=attentions
  ):
    row = there.get(asked)
    if row is None:
      row = measure(*asked)
      append(args.out, row)
    print('| ' + ' | '.join(row.get(name) or '-' for name in columns) + ' |', flush=True)


if __name__ == '__main__':
  main()
