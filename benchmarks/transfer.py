"""What pre-training is worth: the default fine-tuning run from the quickstart's model against the same run from scratch.

    python benchmarks/transfer.py RUN_DIRECTORY [--seeds 3]

RUN_DIRECTORY is what run_pretrain.py made. Prints the test accuracy of each as mean ± standard deviation over the seeds.
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
  """The last test accuracy, in per cent, of the default fine-tuning run from `init`, '' for from scratch."""
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
        f'{name:12} {np.mean(each):.2f} ± {np.std(each, ddof=1):.2f} %  ({", ".join(f"{a:.1f}" for a in each)})'
      )


if __name__ == '__main__':
  main()
