"""A teacher labels images: the probability of each class for every example of a source, in parts that a kill leaves whole."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices as wait_for_all

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
from vit_jax.evaluate.predict import LOGITS_TO_PROBABILITIES, check_trained_head, eval_data_config


def write_pseudo_labels(
  teacher,
  source: Source,
  where: Path,
  *,
  classes: tuple[str, ...],
  asked: dict[str, object],
  progress: Callable[[int], None] = lambda images: None,
  **reading,
):
  """Writes into `where` what `teacher`, a Pretrained, says of the examples, without noise; what is there already stays.

  `classes`: the student's, by name, in their order. `asked`: what is to be told of these labels besides. `reading`: fields of
  DataConfig (batch, workers, …). An image that cannot be read gets zeros. UserError where the teacher lacks one of the classes,
  or `where` holds labels of something else.
  """
  check_trained_head(teacher)
  columns, _ = match_classes(
    classes, teacher.labels, classes=teacher.classes, source=teacher.source
  )
  how = ' '.join(f'{name}={value}' for name, value in sorted(teacher.preprocessing.items()))
  facts = describe_pseudo_labels(
    source, classes, **asked, parameters=_params_checksum(teacher.params), preprocessing=how
  )
  if jax.process_index() == 0:
    start_pseudo_labels(where, facts)
  wait_for_all('labels begun')
  subject, params = make_pretrained_evaluator(
    teacher, eval_data_config(teacher, **reading), progress=progress
  )
  parts = -(-len(source) // PART_EXAMPLES)
  for part in [part for part in range(parts) if not (where / part_file_name(part)).is_file()]:
    logits, read = subject.logits(
      params, source.slice(part * PART_EXAMPLES, (part + 1) * PART_EXAMPLES), columns
    )
    if jax.process_index() == 0:
      write_probabilities(
        where, part, np.where(read[:, None], LOGITS_TO_PROBABILITIES[teacher.loss](logits), 0)
      )
  if jax.process_index() == 0 and not has_pseudo_labels(where):
    write_best_labels(where, parts)
  wait_for_all('labelled')


def _params_checksum(params: dict) -> str:
  """Of NumPy arrays, by name."""
  found = hashlib.blake2b(digest_size=8)
  for name, array in sorted(leaves_by_path(params).items()):
    found.update(name.encode() + np.ascontiguousarray(array).tobytes())
  return found.hexdigest()
