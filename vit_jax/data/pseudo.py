"""Soft labels that a teacher gave to unlabelled images, on disk; and which of the images a student learns from.

  DIR/teacher.json    who labels what; written first
  DIR/00000.npy …     float16 [n, classes]: the probability of each class, for PART examples after another
  DIR/best.npz        written last: of each example its best class and how probable that is, and a digest of all parts

After "Self-training with Noisy Student" (arXiv 1911.04252), §2. Shapes: n examples, k classes.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import zipfile
from pathlib import Path

import grain
import numpy as np

from vit_jax.data import images
from vit_jax.data.fingerprint import checksum_samples, describe_differences
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.runtime.files import explain_write_errors, read_json_object, write_atomically

PART_EXAMPLES = 1 << 16  # Examples in a file: at most so many are labelled again after a kill.
REMOVE_AND_RELABEL = 'remove {} to have it made anew'


@dataclasses.dataclass(kw_only=True, eq=False)
class PseudoLabels:
  """What a teacher said of a source: `labels[i]` is float32 [k], the probability of each class for example i."""

  where: Path
  classes: tuple[str, ...]
  best: np.ndarray  # int32 [n], the most probable class.
  confidence: np.ndarray  # float32 [n], its probability; 0 where an image could not be read.
  digest: str
  part: int

  def __getitem__(self, i: int) -> np.ndarray:
    return self._parts[i // self.part][i % self.part].astype(np.float32)

  @functools.cached_property
  def _parts(self) -> list[np.ndarray]:
    count = -(-len(self.best) // self.part)
    return [np.load(self.where / part_file_name(i), mmap_mode='r') for i in range(count)]

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name != '_parts'}


def part_file_name(part: int) -> str:
  """Of a part's probabilities."""
  return f'{part:05}.npy'


def describe_pseudo_labels(
  source: Source, classes: tuple[str, ...], **teacher: object
) -> dict[str, object]:
  """What teacher.json says: the examples, the classes in the order of the probabilities, and the teacher."""
  facts = {
    'examples': len(source),
    'listing': source.listing(),
    'content': checksum_samples(source),
  }
  return teacher | facts | {'classes': list(classes), 'part': PART_EXAMPLES}


def start_pseudo_labels(where: Path, facts: dict[str, object]):
  """Makes the directory for labels with these facts. UserError where it holds others: each that differs is named."""
  check_same_pseudo_labels(where, facts)
  with explain_write_errors(where):
    where.mkdir(parents=True, exist_ok=True)
    write_atomically(where / 'teacher.json', json.dumps(facts, indent=2) + '\n')


def check_same_pseudo_labels(where: Path, facts: dict[str, object]):
  """UserError where the directory holds labels of which one of these facts is not so."""
  path = where / 'teacher.json'
  if differ := summarize_differences(read_json_object(path) if path.is_file() else {}, facts):
    raise UserError(
      f'{where} holds other pseudo-labels; choose another --workdir. They differ in {differ}'
    )


def summarize_differences(there: dict[str, object], here: dict[str, object]) -> str:
  """The facts that differ, in words: of long ones their names."""
  return '; '.join(
    each if len(each) < 200 else each.partition(':')[0]
    for each in describe_differences(there, here)
  )


def has_pseudo_labels(where: Path) -> bool:
  """Whether the labels of all examples are there."""
  return (where / 'best.npz').is_file()


def write_probabilities(where: Path, part: int, probabilities: np.ndarray):
  """Probabilities [n, k] of the examples from PART * `part` on, whole or not at all."""
  save_atomically(
    where / part_file_name(part), functools.partial(np.save, arr=probabilities.astype(np.float16))
  )


def save_atomically(path: Path, save):
  """What `save` writes into a file, whole or not at all."""
  buffer = io.BytesIO()
  save(buffer)
  with explain_write_errors(path.parent):
    write_atomically(path, buffer.getvalue())


def write_best_labels(where: Path, parts: int):
  """Writes best.npz from what the parts hold."""
  digest, best, confidence = hashlib.blake2b(digest_size=8), [], []
  for part in range(parts):
    probabilities = np.load(where / part_file_name(part))
    digest.update(probabilities.tobytes())
    best.append(probabilities.argmax(axis=1).astype(np.int32))
    confidence.append(probabilities.max(axis=1).astype(np.float32))
  arrays = {
    'best': np.concatenate(best),
    'confidence': np.concatenate(confidence),
    'digest': digest.hexdigest(),
  }
  save_atomically(where / 'best.npz', functools.partial(np.savez, **arrays))


def read_pseudo_labels(where: Path, source: Source, classes: tuple[str, ...]) -> PseudoLabels:
  """The labels of the examples of `source`. UserError where they are incomplete, or of other images or classes."""
  if not (where / 'teacher.json').is_file() or not has_pseudo_labels(where):
    raise UserError(
      f'config.data.pseudo_labels={str(where)!r} holds no whole labels; `python -m vit_jax selftrain` makes them'
    )
  facts = read_json_object(where / 'teacher.json')
  here = describe_pseudo_labels(source, classes)
  here['part'] = facts.get('part')
  if differ := summarize_differences(facts, here):
    raise UserError(
      f'config.data.pseudo_labels={str(where)!r} are of other images or classes than config.data has: {differ}'
    )
  try:
    with (
      (where / 'best.npz').open('rb') as file,
      np.load(file) as arrays,
    ):  # Which leaves a damaged file open.
      best, confidence, digest = (arrays[name] for name in ('best', 'confidence', 'digest'))
    sizes = [
      np.load(where / part_file_name(i), mmap_mode='r').shape
      for i in range(-(-len(source) // facts['part']))
    ]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'{where} is damaged ({error}): {REMOVE_AND_RELABEL.format(where)}') from None
  if (
    sum(n for n, _ in sizes) != len(source)
    or {k for _, k in sizes} != {len(classes)}
    or len(best) != len(source)
  ):
    raise UserError(
      f'{where} holds labels of shapes {sizes} for {len(source)} examples: {REMOVE_AND_RELABEL.format(where)}'
    )
  return PseudoLabels(
    where=where,
    classes=classes,
    best=best,
    confidence=confidence,
    digest=str(digest),
    part=facts['part'],
  )


def select_balanced(
  best: np.ndarray, confidence: np.ndarray, *, classes: int, least: float, count: int, seed: int
) -> np.ndarray:
  """Which examples a student learns from [m], class by class, as often as they stand there.

  Of those whose confidence is `least` or more, each class has `count`: the most confident, or all equally often and some, drawn
  at random, once more. A class that is nobody's best has none.
  """
  sure = np.flatnonzero((confidence >= np.float32(least)) & (confidence > 0))
  order = sure[np.lexsort((-confidence[sure], best[sure]))]  # Equals in the order of the source.
  ends = np.searchsorted(best[order], np.arange(classes + 1))
  chosen = []
  for c, (start, end) in enumerate(itertools.pairwise(ends)):
    if members := end - start:
      times, more = divmod(count, int(members))
      ranks = np.arange(min(count, members)) if not times else np.concatenate([
        np.tile(np.arange(members), times), sample_without_replacement(int(members), more, (seed, c, int(members)))
      ])  # fmt: skip
      chosen.append(order[start + ranks])
  return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def sample_without_replacement(members: int, count: int, key: tuple[int, int, int]) -> np.ndarray:
  """`count` different numbers below `members`."""
  seed = images.random_bits(key, 0)[0] >> 32
  shuffle = functools.partial(
    grain.experimental.index_shuffle, max_index=members - 1, seed=seed, rounds=4
  )
  return np.fromiter((shuffle(i) for i in range(count)), np.int64, count)
