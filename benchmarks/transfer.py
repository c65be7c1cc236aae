"""Measure the benefit of pre-training: fine-tuning from the quickstart's model and from scratch.

    python benchmarks/transfer.py RUN_DIRECTORY [--seeds 3]

RUN_DIRECTORY is a run of run_pretrain.py. Prints the test accuracy of each as mean ± standard
deviation over the seeds.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from vit_jax.metrics.records import read_metrics

ROOT = Path(__file__).parents[1]


def accuracy(init: str, seed: int, workdir: Path) -> float:
  """Return the last test accuracy, in percent, of the default fine-tuning run.

  It starts from `init`, or from scratch if `init` is empty.
  """
  flags = [f'--config.init={init}', f'--config.seed={seed}', f'--workdir={workdir}']
  subprocess.run(
    [sys.executable, str(ROOT / 'run_finetune.py'), *flags], check=True, capture_output=True
  )
  return (
    100
    * [record['test_accuracy'] for record in read_metrics(workdir) if 'test_accuracy' in record][-1]
  )


def main():
  args = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  args.add_argument('run')
  args.add_argument('--seeds', type=int, default=3)
  args = args.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    for name, init in (('fine-tuned', args.run), ('from scratch', '')):
      each = [accuracy(init, seed, Path(scratch) / f'{name}-{seed}') for seed in range(args.seeds)]
      print(
        f'{name:12} {np.mean(each):.2f} ± {np.std(each, ddof=1):.2f} %  '
        f'({", ".join(f"{a:.1f}" for a in each)})'
      )


if __name__ == '__main__':
  main()
