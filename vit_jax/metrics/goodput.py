"""Goodput: the share of a run's life in which it took new steps, over all of its starts.

The life of a run is the wall time from the set-up of its first start to its last line in
goodput.jsonl. It includes evaluations, checkpoints, and the time between a kill and the next start.

The time of new steps is that of the training loop, without compilation, evaluations, checkpoints
and traces, but with the time in which the devices wait for data. A step is new only once. A start
that resumes from an older checkpoint repeats steps: their time counts as repeated. If a line covers
new and repeated steps, its time is divided in proportion to their numbers. A step that changes
nothing, since its loss was not finite, counts too.

    {"start": 1, "time": 1764340000.0, "step": 0, "seconds": 0.0}
    {"start": 1, "time": 1764340025.2, "step": 50, "seconds": 10.4}

`seconds` is the time of the training loop in this start so far, with its compilation. A start
writes a line when it begins, when it is ready for its first step, at each summary, before each
checkpoint and at the end. So each step that no later start repeats is in a line. The steps that
a killed start took after its last line are not known: they count as new when they are repeated.

Within a start, times are those of the monotonic clock. A clock that is set back between two starts
counts as no time between them. Like metrics.jsonl, the file is output only.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vit_jax.metrics.background import BackgroundWriter
from vit_jax.runtime.files import append_text, explain_write_errors, retry_io, write_atomically

FILE_NAME = 'goodput.jsonl'


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
  """A line of goodput.jsonl."""

  start: int  # Number of the start, from 1.
  time: float  # Seconds since 1970.
  step: int
  seconds: float
  complete: bool = False  # True for the last line of a complete run.


@dataclasses.dataclass(slots=True)
class Goodput:
  """The seconds that a run spent on new steps and on others, as far as the added lines tell."""

  starts: int = 0
  life: float = 0.0
  new: float = 0.0  # Time of new steps.
  repeated: float = 0.0  # Time of repeated steps.
  _last: Line | None = None
  _taken: int = 0  # The last step that was taken so far.

  @property
  def share(self) -> float:
    """The goodput."""
    return self.new / self.life if self.life else 0.0

  @property
  def complete(self) -> bool:
    """True if the last line is that of a complete run."""
    return self._last is not None and self._last.complete

  @property
  def last_step(self) -> int:
    """The step of the last line."""
    return self._last.step if self._last else 0

  def add(self, line: Line):
    """Add the next line."""
    last, self._last = self._last, line
    if last is None or line.start != last.start:
      self.starts += 1
      self.life += max(0.0, line.time - last.time) if last else 0.0
    else:
      self.life += max(0.0, line.time - last.time)
      if steps := max(0, line.step - last.step):
        new = max(0, line.step - max(last.step, self._taken)) / steps
        self.new += new * (line.seconds - last.seconds)
        self.repeated += (1 - new) * (line.seconds - last.seconds)
    self._taken = max(self._taken, line.step)

  def values(self) -> dict[str, float]:
    """Return the metrics that a complete run records."""
    return {
      'goodput': self.share,
      'life_seconds': self.life,
      'new_step_seconds': self.new,
      'repeated_step_seconds': self.repeated,
      'starts': self.starts,
    }


def measure_goodput(lines: Iterable[Line]) -> Goodput:
  """Return the goodput of a run from its lines."""
  goodput = Goodput()
  for line in lines:
    goodput.add(line)
  return goodput


def read_goodput(workdir: Path) -> Goodput | None:
  """Return the goodput of a run, or None if it has no goodput.jsonl, as runs of older versions."""
  path = workdir / FILE_NAME
  text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
  lines = list(filter(None, map(_parse_line, text.splitlines())))
  return measure_goodput(lines) if lines else None


def _parse_line(text: str) -> Line | None:
  try:
    line = Line(**json.loads(text))
  except (ValueError, TypeError, RecursionError):
    return None
  whole = type(line.start) is int and type(line.step) is int
  seconds = (line.time, line.seconds)
  finite = all(type(x) in (int, float) and math.isfinite(x) for x in seconds)
  return line if whole and finite else None


class GoodputLog:
  """Writes the lines of this start. On hosts other than the first it writes nothing.

  Storage that fails or hangs never delays nor ends the run.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    step: int,
    steps: int,
    began: float,
    report: Callable[[str], None],
    write: bool = True,
  ):
    """Open the file for a start that resumes after `step` of `steps`.

    The start began at `began` on the monotonic clock. A run that is complete stays as it is: its
    life is over.
    """
    self._goodput, self._writer = Goodput(), None
    if not write:
      return
    path = workdir / FILE_NAME
    with explain_write_errors(workdir):
      lines = _keep_lines(path)
    self._goodput = measure_goodput(lines)
    if self._goodput.complete and self._goodput.last_step == step == steps:
      return
    self._start = lines[-1].start + 1 if lines else 1
    self._offset = time.time() - time.monotonic()
    self._writer = BackgroundWriter(
      str(path), lambda texts: append_text(path, ''.join(texts)), report
    )
    self._add(Line(self._start, began + self._offset, step, 0.0))

  def record(self, step: int, seconds: float, *, complete: bool = False) -> dict[str, float]:
    """Write a line, and return the metrics of the run so far.

    `seconds` is the time of the training loop in this start. Returns nothing if nothing is written.
    """
    if self._writer is None:
      return {}
    now = time.monotonic() + self._offset
    self._add(Line(self._start, now, step, seconds, complete))
    return self._goodput.values()

  def flush(self):
    """Wait until the lines are written, unless storage fails."""
    if self._writer:
      self._writer.flush()

  def close(self):
    """Close the file; a second call does nothing."""
    if self._writer:
      self._writer.close()

  def _add(self, line: Line):
    self._goodput.add(line)
    fields = dataclasses.asdict(line)
    if not line.complete:
      del fields['complete']
    assert self._writer is not None
    self._writer.put(json.dumps(fields) + '\n')


def _keep_lines(path: Path) -> list[Line]:
  """Return the lines of a file, and remove what is not a line from it."""
  if not path.exists():
    return []
  text = retry_io(f'reading {path}', path.read_bytes).decode(errors='replace')
  parsed = [(each, _parse_line(each)) for each in text.splitlines(keepends=True)]
  kept = [(each, line) for each, line in parsed if line and each.endswith('\n')]
  if len(kept) < len(parsed):
    write_atomically(path, ''.join(each for each, _ in kept))
  return [line for _, line in kept]
