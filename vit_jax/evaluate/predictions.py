"""predictions.npz: the predictions of the last evaluation of a run, for its report.

Like metrics.jsonl it is output only. Arrays: label [n, m], mask [n], loss [n], top5 [n, 5],
top5_probabilities [n, 5], in the order of the evaluation split, and the step.
"""

import io
import zipfile
from pathlib import Path

import numpy as np

from vit_jax.evaluate.evaluator import Rows
from vit_jax.runtime.files import write_atomically

_FILE = 'predictions.npz'
_NAMES = ('label', 'mask', 'loss', 'top5', 'top5_probabilities')


def save_predictions(workdir: Path, rows: Rows, step: int):
  """Write the rows of `classification` after `step`. Rows of another output are not written."""
  if not all(name in rows for name in _NAMES):
    return
  file = io.BytesIO()
  np.savez_compressed(file, step=np.int64(step), **{name: rows[name] for name in _NAMES})
  write_atomically(workdir / _FILE, file.getvalue())


def load_predictions(workdir: Path, step: int) -> Rows | None:
  """Return the rows that `save_predictions` wrote after `step`, or None without a valid file."""
  try:
    with np.load(workdir / _FILE) as arrays:
      rows = {name: arrays[name] for name in _NAMES}
      return rows if int(arrays['step']) == step else None
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None
