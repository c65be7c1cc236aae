"""Run a published result whose budget is for one GPU, as `vit-jax reproduce NAME` does.

    python benchmarks/gpu_reproduce.py NAME [--root DIR] [--out DIR]
    python benchmarks/gpu_reproduce.py NAME --smoke      a few steps of a tiny model, on any machine

The data are those of the row: TFDS, or the source in $VIT_JAX_CIFAR10 and $VIT_JAX_CIFAR100.
A run is resumed by the same command. The exit code is 1 if the result is missed.
"""

import argparse
import dataclasses

import jax

from vit_jax.cli.jobs import enable_compilation_cache, run_and_report_errors
from vit_jax.cli.reproduce import run_result
from vit_jax.errors import UserError, did_you_mean
from vit_jax.paper import published_results
from vit_jax.paper.published_results import PublishedResult

_TINY = {
  'data.train': 'builtin:digits', 'data.split': 'train[:64]', 'data.eval_split': 'test[:40]',
  'data.batch': 16, 'data.eval_batch': 40, 'data.size': (8, 8), 'data.workers': 0,
  'model.width': 32, 'model.depth': 1, 'model.mlp': 64, 'model.heads': 2,
  'optim.warmup': '0', 'epochs': 0.0, 'steps': 2, 'eval_every': '0', 'save_every': '0',
}  # fmt: skip


def shrink(result: PublishedResult) -> PublishedResult:
  """Return a tiny run of the same recipe, which any accuracy matches, for this machine."""
  run = result.make_run()
  run = dataclasses.replace(run, settings=run.settings | _TINY)
  return dataclasses.replace(
    result,
    target=0.1,
    tolerance=1.0,
    seeds=result.seeds[:1],
    device=jax.default_backend(),
    make_run=lambda: run,
  )


def main():
  """Run the result and print both numbers."""
  top = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  top.add_argument('name', metavar='NAME')
  top.add_argument('--root', default='runs/reproduce', metavar='DIR', help='directory of the runs')
  top.add_argument('--out', default='results', metavar='DIR', help='directory of reproduced.csv')
  top.add_argument('--smoke', action='store_true', help='a tiny run, on any machine')
  args = top.parse_args()
  results = published_results.PUBLISHED_RESULTS
  if args.name not in results:
    raise UserError(f'{args.name}: no such result.{did_you_mean(args.name, results)}')
  if args.smoke:
    results[args.name] = shrink(results[args.name])
  enable_compilation_cache()
  run_result(args)


if __name__ == '__main__':
  run_and_report_errors(main)
