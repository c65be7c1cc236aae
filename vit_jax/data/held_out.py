"""A held-out part of a split, for choosing settings, and the rest of it.

    train/held_out:10%    about a tenth of `train`
    train/rest:10%        all other examples of `train`

The text before the slash is any split in TFDS's syntax. Every class with two examples or more has
at least one in either part, where the source lists its labels. Other sources, which TFDS has
shuffled, hold out their last examples.
"""

import hashlib
import re
from collections.abc import Callable

import numpy as np

from vit_jax.errors import UserError

Spans = list[tuple[str, int, int]]  # (split, start, stop)

_PATTERN = re.compile(r'(.+)/(held_out|rest):(\d+(?:\.\d+)?)%')


def name_parts(split: str, percent: float) -> tuple[str, str]:
  """Return the names of the rest and of the held-out part of a split."""
  return f'{split}/rest:{percent:g}%', f'{split}/held_out:{percent:g}%'


def parse_part(spec: str) -> tuple[str, str, float]:
  """Return (split, 'held_out' or 'rest', fraction) of the name of a part; others have ('', 0).

  Raises UserError for a fraction that is not between 0 and 1.
  """
  match = _PATTERN.fullmatch(spec)
  if not match:
    return spec, '', 0.0
  if not 0 < float(match[3]) < 100:
    raise UserError(f'{spec}: the held-out part is between 0% and 100%, such as 10%')
  return match[1], match[2], float(match[3]) / 100


def take_part(
  spans: Spans, part: str, fraction: float, read_labels: Callable[[str], np.ndarray] | None
) -> Spans:
  """Return the spans of a part.

  Args:
    spans: the examples of the split.
    part: 'held_out' or 'rest'.
    fraction: the held-out fraction.
    read_labels: returns the labels [n, m] of all examples of a split, if the source lists them.
  """
  count = sum(stop - start for _, start, stop in spans)
  groups = np.zeros(count, np.int32)
  if read_labels:
    labels = [read_labels(split)[start:stop] for split, start, stop in spans]
    groups = np.concatenate([each[:, 0] if each.shape[1] else each.sum(axis=1) for each in labels])
  held_out = _hold_out(groups, fraction, shuffled=read_labels is None)
  return _select(spans, held_out if part == 'held_out' else ~held_out)


def _hold_out(groups: np.ndarray, fraction: float, *, shuffled: bool) -> np.ndarray:
  """Return the mask [n] of the held-out examples: a fraction of each group of equal labels.

  The order in a group is that of a hash of the position, as in `split_train_test`, so it is the
  same on every machine and needs no seed.
  """
  mask = np.zeros(len(groups), bool)
  order = np.argsort(groups, kind='stable')
  for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
    limits = (1, len(members) - 1) if len(members) > 1 else (0, 0)
    count = int(np.clip(round(fraction * len(members)), *limits))
    ranked = members if shuffled else sorted(members, key=_rank)
    mask[ranked[len(members) - count :]] = True
  return mask


def _rank(position: int) -> bytes:
  return hashlib.blake2b(str(position).encode(), digest_size=8).digest()


def _select(spans: Spans, mask: np.ndarray) -> Spans:
  """Return the spans of the examples where `mask` [n] is True."""
  out, offset = [], 0
  for split, start, stop in spans:
    chosen = np.concatenate([[False], mask[offset : offset + stop - start], [False]])
    edges = (np.flatnonzero(np.diff(chosen)) + start).tolist()
    out += [(split, first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]
    offset += stop - start
  return out
