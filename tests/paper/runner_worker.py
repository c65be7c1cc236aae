"""Execute two small runs, the second of which starts from the first. test_runner.py kills it.

Arguments: the root directory of the runs, the CSV file.
"""

import sys
from pathlib import Path

from vit_jax.paper.runner import execute_runs, write_records_csv
from vit_jax.paper.runs import ExperimentRun

TINY = {
  'model.width': 16,
  'model.depth': 1,
  'model.mlp': 16,
  'model.heads': 1,
  'data.batch': 32,
  'data.eval_batch': 200,
}
SHORT = {
  'steps': 24,
  'data.train': 'builtin:digits',
  'data.split': 'train[:400]',
  'data.eval_split': 'test[:200]',
  'probes': (),
}
FIRST = ExperimentRun(
  row='first', column='digits', config='configs/mini.py:ViT-S,digits', settings=TINY | SHORT
)
SECOND = ExperimentRun(
  row='second',
  column='digits',
  config=FIRST.config,
  settings=TINY | SHORT | {'optim.lr': 1e-4},
  init=FIRST,
)

if __name__ == '__main__':
  write_records_csv(execute_runs([FIRST, SECOND], Path(sys.argv[1])), Path(sys.argv[2]))
