"""Run Noisy Student in miniature: a teacher on a tenth of Fashion-MNIST's labels, and its student.

    python benchmarks/noisy_student.py [--seeds 3] [--workdir runs/mini_student] [--out results]

Each seed is `python -m vit_jax selftrain` with configs/noisy_student.py:mini and mini,3. Complete
stages are not repeated. Prints the test accuracy of each as mean ± standard deviation over the
seeds, and writes OUT/noisy_student.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.run_directory import read_run_config
from vit_jax.training.setup import open_sources

CONFIG = 'configs/noisy_student.py:mini'
STAGES = {'teacher': '0-teacher', 'student': '1-student'}


def accuracies(seed: int, workdir: Path) -> dict[str, object]:
  """Return the test accuracy of teacher and student, and the quality of the pseudo-labels."""
  flags = [
    '--teacher',
    CONFIG,
    '--students',
    f'{CONFIG},3',
    '--workdir',
    str(workdir),
    f'--config.seed={seed}',
  ]
  subprocess.run([sys.executable, '-m', 'vit_jax', 'selftrain', *flags], check=True)
  measured = {
    name: json.loads((workdir / stage / 'done.json').read_text(encoding='utf-8'))
    for name, stage in STAGES.items()
  }
  return (
    {'seed': seed}
    | {name: result['test_accuracy'] for name, result in measured.items()}
    | labels(workdir)
  )


def labels(workdir: Path) -> dict[str, object]:
  """Return (the images above the threshold, the fraction of correct labels among them)."""
  student = open_sources(read_run_config(workdir / '1-student'))[0].unlabelled
  chosen = np.unique(student.indices)
  right = [student.pseudo_labels.top_class[i] in student.source[int(i)][1] for i in chosen]
  return {'images': len(chosen), 'right': float(np.mean(right))}


def main():
  args = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  args.add_argument('--seeds', type=int, default=3)
  args.add_argument('--workdir', type=Path, default=Path('runs/mini_student'))
  args.add_argument('--out', type=Path, default=Path('results'))
  args = args.parse_args()
  rows = [accuracies(seed, args.workdir / str(seed)) for seed in range(args.seeds)]
  with (args.out / 'noisy_student.csv').open('w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, [*rows[0]], lineterminator='\n')
    writer.writeheader()
    writer.writerows(
      row | {name: f'{row[name]:.4f}' for name in (*STAGES, 'right')} for row in rows
    )
  for name in STAGES:
    each = [100 * row[name] for row in rows]
    print(
      f'{name:8} {np.mean(each):.2f} ± {np.std(each, ddof=1):.2f} %  '
      f'({", ".join(f"{a:.1f}" for a in each)})'
    )
  gain = [100 * (row['student'] - row['teacher']) for row in rows]
  print(
    f'{"gain":8} {np.mean(gain):+.2f} ± {np.std(gain, ddof=1):.2f}    '
    f'({", ".join(f"{a:+.1f}" for a in gain)})'
  )


if __name__ == '__main__':
  main()
