"""The outputs of a run: metrics.jsonl, TensorBoard, experiment trackers and the screen.

`records.py` describes the records.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import jax
import tqdm

from vit_jax.metrics.background import BackgroundWriter
from vit_jax.metrics.records import parse_record
from vit_jax.metrics.tensorboard import EventFiles, purge_events, scalar_event
from vit_jax.metrics.trackers import TrackerWriter
from vit_jax.runtime.files import append_text, explain_write_errors, retry_io, write_atomically


class MetricsWriter:
  """Writes the records of one run. On hosts other than the first it writes nothing.

  Storage that fails or hangs never delays nor ends the run.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    step: int,
    steps: int,
    write: bool = True,
    trackers: tuple[str, ...] = (),
    config: dict[str, object] | None = None,
  ):
    """Open the files of a run that continues after `step` of `steps`.

    Records of later steps, which an interrupted run wrote, are removed: those steps are taken
    again. Lines that are not records are removed too, with a note on the screen. `trackers` are
    names in trackers.py, which also record `config`.
    """
    self._steps, self._write, self._bar = steps, write, None
    if not write:
      return
    path = workdir / 'metrics.jsonl'
    with explain_write_errors(workdir):
      keep_records(path, step)
    self._lines = BackgroundWriter(
      str(path), lambda lines: append_text(path, ''.join(lines)), self.print_line
    )
    folder = workdir / 'tensorboard'
    self._event_files = EventFiles(folder)
    self._events = BackgroundWriter(str(folder), self._event_files.write, self.print_line)
    for event in purge_events(step + 1):
      self._events.put(event)
    self._trackers = [
      TrackerWriter(name, workdir, config or {}, self.print_line) for name in trackers
    ]
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True)

  def write(self, step: int, values: dict[str, float], *, kind: str):
    """Write scalars of `step` to metrics.jsonl, TensorBoard and the trackers."""
    if not self._write:
      return
    finite = {name: x if math.isfinite(x) else str(x) for name, x in values.items()}
    self.write_jsonl(step, finite, kind=kind)
    for name, value in values.items():
      self._events.put(scalar_event(step, name, value))
    for tracker in self._trackers:
      tracker.put(step, values)

  def write_jsonl(self, step: int, values: dict, *, kind: str):
    """Write a record of `step`, which may hold lists and text, to metrics.jsonl alone."""
    if self._write:
      self._lines.put(json.dumps({'step': step, 'kind': kind} | values) + '\n')

  def flush(self):
    """Wait until the records are written, unless storage fails."""
    if self._write:
      self._lines.flush()

  def show_progress(self, step: int, values: dict[str, float]):
    """Show the last loss and learning rate, the speed, and the time left."""
    shown = {
      'loss': f'{values["loss"]:.4f}',
      'lr': f'{values["lr"]:.2e}',
      'img/s': f'{values["images_per_second"]:,.0f}',
      'data wait': f'{values["data_wait"]:.0%}',
    }
    if 'mfu' in values:
      shown['mfu'] = f'{values["mfu"]:.1%}'
    if self._bar:
      self._bar.n = step
      self._bar.set_postfix(shown)  # This redraws the bar, too.
    else:
      left = (self._steps - step) * values['seconds_per_step']
      text = '  '.join(f'{name} {value}' for name, value in shown.items())
      self.print_line(f'step {step}/{self._steps}  {text}  left {tqdm.tqdm.format_interval(left)}')

  def print_line(self, text: str):
    """Print a line to standard error, above the progress bar."""
    if self._write:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self):
    """Close the progress bar and the files; a second call does nothing."""
    if self._bar:
      self._bar.close()
    if self._write:
      self._lines.close()
      self._events.close()
      for tracker in self._trackers:
        tracker.close()
      with contextlib.suppress(OSError):
        self._event_files.close()


def keep_records(path: Path, last_step: int):
  """Remove from a file of records those after `last_step` and lines that are not records.

  The other lines stay as they are. A file that does not exist is left alone.
  """
  if not path.exists():
    return
  text = retry_io(f'reading {path}', path.read_bytes).decode(errors='replace')
  lines = text.splitlines(keepends=True)
  records = [parse_record(line) if line.endswith('\n') else None for line in lines]
  bad = [number for number, record in enumerate(records[:-1], start=1) if record is None]
  if bad:
    where = f'{path}: removed {len(bad)} lines that are not records; the first is line {bad[0]}'
    tqdm.tqdm.write(where, file=sys.stderr)
  kept = [line for line, x in zip(lines, records, strict=True) if x and x['step'] <= last_step]
  write_atomically(path, ''.join(kept))


class Stopwatch:
  """Measures seconds of training alone."""

  def __init__(self):
    self._start, self._laps = time.monotonic(), 0.0
    self._paused_at: float | None = None

  def lap(self) -> float:
    """Return the seconds since the last lap, without the pauses, and start the next lap."""
    now, start = time.monotonic(), self._start
    self._start, self._laps = now, self._laps + now - start
    return now - start

  def total(self) -> float:
    """Return the seconds since the stopwatch exists, without the pauses."""
    now = time.monotonic() if self._paused_at is None else self._paused_at
    return self._laps + now - self._start

  @contextlib.contextmanager
  def paused(self, arrays):
    """Stop the clock inside the context, once the devices have computed `arrays`."""
    jax.block_until_ready(arrays)
    self._paused_at = time.monotonic()
    yield
    self._start += time.monotonic() - self._paused_at
    self._paused_at = None
