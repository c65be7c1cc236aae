"""Pseudo-labels on disk, and the selection of the images that a student learns from.

A teacher writes the class probabilities of unlabelled images into a directory:

  DIR/teacher.json    the source, the classes and the teacher; written first
  DIR/00000.npy …     float16 [n, k] class probabilities of PART_EXAMPLES consecutive examples
  DIR/best.npz        top class and its probability for each example, checksum; written last

After "Self-training with Noisy Student" (arXiv 1911.04252), §2. Shapes: n examples, k classes.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.fingerprint import describe_differences, source_facts
from vit_jax.data.sampler import sample_without_replacement
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.runtime.files import explain_write_errors, read_json_object, write_atomically

PART_EXAMPLES = 1 << 16  # Examples in a file, and the most that are lost when a job is killed.
# NumPy parses array headers with `ast`, which may fail in CPython 3.11 if two threads do so.
_LOAD_LOCK = threading.Lock()
REMOVE_AND_RELABEL = 'remove {} and label the images again'


@dataclasses.dataclass(kw_only=True, eq=False)
class PseudoLabels:
  """A teacher's class probabilities: `labels[i]` is float32 [k] for example i of the source."""

  directory: Path
  label_names: tuple[str, ...]
  top_class: np.ndarray  # int32 [n], the most probable class.
  confidence: np.ndarray  # float32 [n], its probability; 0 for an image that could not be read.
  checksum: str
  part_examples: int

  def __getitem__(self, i: int) -> np.ndarray:
    return self._parts[i // self.part_examples][i % self.part_examples].astype(np.float32)

  @functools.cached_property
  def _parts(self) -> list[np.ndarray]:
    count = -(-len(self.top_class) // self.part_examples)
    with _LOAD_LOCK:
      return [np.load(self.directory / part_file_name(i), mmap_mode='r') for i in range(count)]

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name != '_parts'}


def part_file_name(part: int) -> str:
  """Return the name of the file with part number `part` of the probabilities."""
  return f'{part:05}.npy'


def describe_pseudo_labels(
  source: Source, label_names: tuple[str, ...], **teacher: object
) -> dict[str, object]:
  """Return the contents of teacher.json: facts about the source, the classes and the teacher.

  The classes are in the order of the probabilities.
  """
  return teacher | source_facts(source) | {'classes': list(label_names), 'part': PART_EXAMPLES}


def start_pseudo_labels(directory: Path, facts: dict[str, object]):
  """Create the directory for pseudo-labels with the given facts.

  Raises UserError, with each fact that differs, if it contains other pseudo-labels.
  """
  check_same_pseudo_labels(directory, facts)
  with explain_write_errors(directory):
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / 'teacher.json', json.dumps(facts, indent=2) + '\n')


def check_same_pseudo_labels(directory: Path, facts: dict[str, object]):
  """Check that the directory contains no pseudo-labels, or those with the given facts.

  Raises UserError with each fact that differs.
  """
  path = directory / 'teacher.json'
  recorded = read_json_object(path) if path.is_file() else {}
  if differences := summarize_differences(recorded, facts):
    raise UserError(
      f'{directory} contains other pseudo-labels, which differ in {differences}. '
      'Choose another --workdir'
    )


def summarize_differences(recorded: dict[str, object], current: dict[str, object]) -> str:
  """Return the facts that differ on one line, with only the names of long ones."""
  return '; '.join(
    line if len(line) < 200 else line.partition(':')[0]
    for line in describe_differences(recorded, current)
  )


def has_pseudo_labels(directory: Path) -> bool:
  """Return whether the pseudo-labels of all examples have been written."""
  return (directory / 'best.npz').is_file()


def write_probabilities(directory: Path, part: int, probabilities: np.ndarray):
  """Write one part atomically: probabilities [n, k] of the examples from PART_EXAMPLES * part."""
  save = functools.partial(np.save, arr=probabilities.astype(np.float16))
  save_atomically(directory / part_file_name(part), save)


def save_atomically(path: Path, save: Callable[[io.BytesIO], None]):
  """Write what `save` writes into a buffer to a file, completely or not at all."""
  buffer = io.BytesIO()
  save(buffer)
  with explain_write_errors(path.parent):
    write_atomically(path, buffer.getvalue())


def write_best_labels(directory: Path, parts: int):
  """Write best.npz from all parts."""
  digest, top_class, confidence = hashlib.blake2b(digest_size=8), [], []
  for part in range(parts):
    probabilities = np.load(directory / part_file_name(part))
    digest.update(probabilities.tobytes())
    top_class.append(probabilities.argmax(axis=1).astype(np.int32))
    confidence.append(probabilities.max(axis=1).astype(np.float32))
  arrays = {
    'best': np.concatenate(top_class),
    'confidence': np.concatenate(confidence),
    'digest': digest.hexdigest(),
  }
  save_atomically(directory / 'best.npz', functools.partial(np.savez, **arrays))


def read_pseudo_labels(
  directory: Path, source: Source, label_names: tuple[str, ...]
) -> PseudoLabels:
  """Read the pseudo-labels of the examples of `source`.

  Raises UserError if they are missing, incomplete or damaged, or belong to other images or classes.
  """
  if not (directory / 'teacher.json').is_file() or not has_pseudo_labels(directory):
    raise UserError(
      f'config.data.pseudo_labels={str(directory)!r} has no complete pseudo-labels; '
      'to make them, run: python -m vit_jax selftrain'
    )
  facts = read_json_object(directory / 'teacher.json')
  expected = describe_pseudo_labels(source, label_names) | {'part': facts.get('part')}
  if differences := summarize_differences(facts, expected):
    raise UserError(
      f'config.data.pseudo_labels={str(directory)!r} are for other images or classes than those '
      f'of config.data: {differences}'
    )
  shape = (len(source), len(label_names))
  try:
    top_class, confidence, checksum = _read_arrays(directory, shape, facts['part'])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    remedy = REMOVE_AND_RELABEL.format(directory)
    raise UserError(f'{directory} is damaged ({error}): {remedy}') from None
  return PseudoLabels(
    directory=directory,
    label_names=label_names,
    top_class=top_class,
    confidence=confidence,
    checksum=checksum,
    part_examples=facts['part'],
  )


def _read_arrays(
  directory: Path, shape: tuple[int, int], part_examples: int
) -> tuple[np.ndarray, np.ndarray, str]:
  """Return (top class, confidence, checksum), after checking the shapes of all files."""
  examples, classes = shape
  # np.load leaves a damaged file open unless it is given an open file.
  with (directory / 'best.npz').open('rb') as file, np.load(file) as arrays:
    top_class, confidence, checksum = (arrays[name] for name in ('best', 'confidence', 'digest'))
  parts = range(-(-examples // part_examples))
  shapes = [np.load(directory / part_file_name(i), mmap_mode='r').shape for i in parts]
  complete = sum(n for n, _ in shapes) == len(top_class) == examples
  if not complete or {k for _, k in shapes} != {classes}:
    raise ValueError(f'its files have the shapes {shapes}, expected {examples} x {classes}')
  return top_class, confidence, str(checksum)


def select_balanced(
  top_class: np.ndarray,
  confidence: np.ndarray,
  *,
  classes: int,
  threshold: float,
  count: int,
  seed: int,
) -> np.ndarray:
  """Select the images that a student learns from: `count` for each class.

  Only images with a confidence of at least `threshold` are selected. A class with more than
  `count` of them gets the most confident. A class with fewer repeats all of them equally often,
  and a random subset once more. A class that is no image's top class gets none.

  Args:
    top_class: int [n], the most probable class of each image.
    confidence: float32 [n], its probability.
    classes: Number of classes.
    threshold: Lowest confidence.
    count: Images per class.
    seed: Seed of the random subsets.

  Returns:
    Indices of images, int64 [m], sorted by class. An index may repeat.
  """
  confident = np.flatnonzero((confidence >= np.float32(threshold)) & (confidence > 0))
  # By class, then by falling confidence; lexsort keeps the order of the source among equals.
  order = confident[np.lexsort((-confidence[confident], top_class[confident]))]
  ends = np.searchsorted(top_class[order], np.arange(classes + 1))
  selected = [np.zeros(0, np.int64)]
  for c, (start, end) in enumerate(itertools.pairwise(ends)):
    members = int(end - start)
    if members >= count:
      selected.append(order[start : start + count])
    elif members:
      repeats, rest = divmod(count, members)
      extra = sample_without_replacement(members, rest, (seed, c, members))
      selected.append(order[start + np.concatenate([np.tile(np.arange(members), repeats), extra])])
  return np.concatenate(selected)
