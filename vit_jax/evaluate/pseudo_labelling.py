"""Write a teacher's class probabilities for every example of a source.

They are written in parts, so that an interrupted job resumes after its last part.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from vit_jax.checkpoint.checksum import leaves_by_path
from vit_jax.data.class_names import match_classes
from vit_jax.data.pseudo_labels import (
  PART_EXAMPLES,
  describe_pseudo_labels,
  has_pseudo_labels,
  part_file_name,
  start_pseudo_labels,
  write_best_labels,
  write_probabilities,
)
from vit_jax.data.sources import Source
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.outputs import probabilities_of
from vit_jax.evaluate.predict import check_trained_head, eval_data_config


def write_pseudo_labels(
  teacher,
  source: Source,
  directory: Path,
  *,
  classes: tuple[str, ...],
  facts: dict[str, object],
  on_batch: Callable[[int], None] = lambda examples: None,
  **data_options,
):
  """Write the probabilities that `teacher` predicts for the examples, without noise.

  An image that cannot be read gets zeros. Parts that exist are kept.

  Args:
    teacher: A `PretrainedModel`.
    source: The examples.
    directory: Where the probabilities are written.
    classes: The names of the student's classes, in their order.
    facts: Further facts to record. Labels with other facts are not resumed.
    on_batch: Called with the number of examples of each batch.
    **data_options: Fields of `DataConfig`, and `batch`.

  Raises UserError if the teacher lacks one of the classes, or if `directory` has other labels.
  """
  check_trained_head(teacher)
  logit_indices, _ = match_classes(
    classes, teacher.labels, classes=teacher.classes, source=teacher.source
  )
  facts = facts | _describe_teacher(teacher)
  is_writer = jax.process_index() == 0
  if is_writer:
    start_pseudo_labels(directory, describe_pseudo_labels(source, classes, **facts))
  sync_global_devices('pseudo-labels started')
  data = eval_data_config(teacher, **data_options)
  evaluator, params = make_pretrained_evaluator(teacher, data, on_batch=on_batch)
  output = probabilities_of(teacher.loss, tuple(logit_indices.tolist()))
  parts = -(-len(source) // PART_EXAMPLES)
  missing = [i for i in range(parts) if not (directory / part_file_name(i)).is_file()]
  for part in missing:
    examples = source.slice(part * PART_EXAMPLES, (part + 1) * PART_EXAMPLES)
    rows = evaluator.rows(params, examples, output)
    if is_writer:
      probabilities = np.where(rows['mask'][:, None], rows['probabilities'], 0)
      write_probabilities(directory, part, probabilities)
  if is_writer and not has_pseudo_labels(directory):
    write_best_labels(directory, parts)
  sync_global_devices('pseudo-labels complete')


def _describe_teacher(teacher) -> dict[str, str]:
  """Return what identifies the teacher: a checksum of its parameters, and its preprocessing."""
  preprocessing = sorted(teacher.preprocessing.to_dict().items())
  return {
    'parameters': _params_checksum(teacher.params),
    'preprocessing': ' '.join(f'{name}={value}' for name, value in preprocessing),
  }


def _params_checksum(params: dict) -> str:
  """Return a checksum of NumPy arrays and their names. It is on disk and must not change."""
  checksum = hashlib.blake2b(digest_size=8)
  for name, array in sorted(leaves_by_path(params).items()):
    checksum.update(name.encode() + np.ascontiguousarray(array).tobytes())
  return checksum.hexdigest()
