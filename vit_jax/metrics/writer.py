"""What a run says: metrics.jsonl, TensorBoard, the progress line and, at its end, curves.png.

One record a line: {"step", "loss", "lr", "images_per_second", …} while training, and after an evaluation
{"step", "test_accuracy", "test_accuracy_top5", "test_loss", "test_examples"} with the split's name first.
"""

import contextlib
import json
import math
import operator
import sys
import time
from pathlib import Path

import jax
import tensorboardX
import tqdm

from vit_jax.errors import UserError


class MetricsWriter:
  """The records of one run. Only the first host makes one that writes."""

  def __init__(self, workdir: Path, *, step: int, steps: int, write: bool = True):
    """Goes on after `step` of `steps`: what an interrupted run wrote of later steps is taken out, as they are done again."""
    self._path, self._steps, self._write = workdir / 'metrics.jsonl', steps, write
    self._bar, self.records = None, []  # Those that were there, on the host that writes.
    if not write:
      return
    kept = [line for line in read_record_lines(self._path) if json.loads(line)['step'] <= step]
    self._path.write_text(''.join(kept))
    self.records = [json.loads(line) for line in kept]
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=30
    )
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True)

  def record(self, step: int, values: dict[str, float]):
    """Writes `values` of `step` everywhere but to the screen."""
    if not self._write:
      return
    self.note(
      step, {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
    )
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)

  def note(self, step: int, values: dict):
    """Writes a line about `step` to metrics.jsonl only."""
    if self._write:
      with self._path.open('a') as file:
        file.write(json.dumps({'step': step} | values) + '\n')

  def progress(self, step: int, values: dict[str, float]):
    """The progress line: loss, learning rate, images a second and, where it is known, the share of the chip's peak."""
    shown = {
      'loss': f'{values["loss"]:.4f}',
      'lr': f'{values["lr"]:.2e}',
      'img/s': f'{values["images_per_second"]:,.0f}',
    }
    if 'mfu' in values:
      shown['mfu'] = f'{values["mfu"]:.1%}'
    if self._bar:
      self._bar.n = step
      self._bar.set_postfix(shown)  # Draws it, too.
    else:
      left = (self._steps - step) * values['seconds_per_step']
      text = '  '.join(f'{name} {value}' for name, value in shown.items())
      self.say(f'step {step}/{self._steps}  {text}  left {tqdm.tqdm.format_interval(left)}')

  def say(self, text: str):
    """A line on the screen, above the progress bar."""
    if self._write:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self):
    """Flushes what is open."""
    if self._bar:
      self._bar.close()
    if self._write:
      self._tensorboard.close()


class Stopwatch:
  """Seconds of training alone."""

  def __init__(self):
    self._start = time.monotonic()

  def lap(self) -> float:
    """Seconds since the last lap, without the pauses."""
    now, start = time.monotonic(), self._start
    self._start = now
    return now - start

  @contextlib.contextmanager
  def paused(self, work):
    """Stands still inside; waits first until `work`, arrays that training is still computing, is there."""
    jax.block_until_ready(work)
    began = time.monotonic()
    yield
    self._start += time.monotonic() - began


def read_record_lines(path: Path) -> list[str]:
  """The lines of a file of records; none where it doesn't exist. A last one that a crash cut short is left out.

  UserError for any other that is no record of a step.
  """
  lines = path.read_text(errors='replace').splitlines(keepends=True) if path.exists() else []
  lines = [line for line in lines if line.endswith('\n')]
  for number, line in enumerate(lines, start=1):
    try:
      operator.index(json.loads(line)['step'])
    except (ValueError, TypeError, KeyError):
      raise UserError(
        f'{path}, line {number} is no record of a step: {line[:80]!r}; remove it'
      ) from None
  return lines


def read_metrics(workdir: Path) -> list[dict]:
  """All records of a run."""
  return [json.loads(line) for line in read_record_lines(workdir / 'metrics.jsonl')]


def evaluation_records(workdir: Path) -> list[dict]:
  """The records of a run that evaluations made."""
  return [
    record for record in read_metrics(workdir) if any(name.endswith('_loss') for name in record)
  ]


def probe_records(workdir: Path) -> list[dict]:
  """The records that config.probes made."""
  return [record for record in read_metrics(workdir) if any('/' in name for name in record)]


def steps_of_records(records: list[dict]) -> set[int]:
  """After which steps they were made."""
  return {record['step'] for record in records}


def format_metrics(result: dict[str, float]) -> str:
  """An evaluation for the screen."""
  return '  '.join(
    f'{name} {value:,}' if isinstance(value, int) else f'{name} {value:.4f}'
    for name, value in result.items()
  )


def plot_curves(workdir: Path) -> Path:
  """curves.png: the loss in training and evaluation, the accuracy, and the learning rate, over the steps."""
  from matplotlib.backends.backend_agg import (
    FigureCanvasAgg,
  )  # Slow to import, and used once a run.
  from matplotlib.figure import Figure

  records = read_metrics(workdir)
  panels = {
    'loss': [n for n in metric_names(records) if n == 'loss' or n.endswith('_loss')],
    'accuracy': [n for n in metric_names(records) if n.endswith('_accuracy')],
    'learning rate': ['lr'],
  }
  figure = Figure(figsize=(12, 3.5), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
    for name in series:
      points = [(r['step'], float(r[name])) for r in records if name in r]
      axes.plot(*zip(*points, strict=True), label=name, marker='.' if len(points) < 30 else None)
    axes.set(title=title, xlabel='step')
    axes.grid(alpha=0.3)
    if series:
      axes.legend()
  figure.savefig(workdir / 'curves.png', dpi=110)
  return workdir / 'curves.png'


def metric_names(records: list[dict]) -> list[str]:
  """The keys of the records, in the order in which they first appear."""
  return list(dict.fromkeys(name for record in records for name in record))
