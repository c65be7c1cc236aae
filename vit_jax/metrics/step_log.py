"""A log of what each step did.

It is read late, so that the training loop never waits for the devices.

A step whose loss or gradients are not finite, or are spikes (optim/spike_guard.py), leaves the
state unchanged. The log counts it and records its examples in metrics.jsonl; `max_bad_steps` in a
row end the run. Images that could not be read are recorded as well, and their number is limited by
`max_bad_fraction`. With `log_ids` each step gets a line in ids.jsonl, {"step": 7, "loss":
"0x1.26bb1ap+1", "ids": [...]}: the exact loss, and the examples of the global batch in their order.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from vit_jax.config import Config
from vit_jax.data.loader import diagnose_bad_example, max_bad_examples
from vit_jax.data.mixture import MixtureSource
from vit_jax.data.sources import Source
from vit_jax.errors import DivergedError, StorageError, UserError
from vit_jax.metrics.data_wait import HIGH_SHARE, DataWait, describe_wait
from vit_jax.metrics.goodput import GoodputLog
from vit_jax.metrics.writer import MetricsWriter, Stopwatch, keep_records
from vit_jax.runtime.cluster import broadcast_first
from vit_jax.runtime.files import append_text, explain_write_errors, retry_io, summarize_error

T = TypeVar('T')

MAX_PRINTED_IDS = 8  # Examples named in one line on the screen; metrics.jsonl has all.
SKIP_REASON_TEXTS = {
  'not_finite': 'its loss or gradients are not finite',
  'spikes': 'its loss or gradient norm is a spike',
}


def open_step_log(
  config: Config,
  source: Source | MixtureSource,
  writer: MetricsWriter,
  *,
  ids_path: Path,
  step: int,
  counters: dict,
  goodput: GoodputLog,
  measure: Callable[[float], dict[str, float]],
) -> 'StepLog':
  """Open the log of a run that continues after `step`, with the counters of its checkpoint.

  `measure` maps seconds per step to the metrics that are recorded about speed and memory. All hosts
  call it.
  """
  examples, batch = len(source), config.data.batch

  def max_bad_images(step: int) -> int:
    epochs_begun = -(-step * batch // examples)
    return max_bad_examples(config.data, examples) * epochs_begun

  def describe(example: int) -> str:
    return ': '.join(diagnose_bad_example(source, example, config.data.max_pixels))

  return StepLog(
    writer,
    goodput=goodput,
    measure=measure,
    ids_path=ids_path if config.log_ids else None,
    max_bad_steps=config.optim.max_bad_steps,
    max_bad_images=max_bad_images,
    describe_bad_example=describe,
    describe_wait=functools.partial(
      describe_wait, workers=config.data.workers, threads=config.data.threads
    ),
    step=step,
    counters=counters,
  )


class StepLog:
  """The log of one run's steps, identical on all hosts."""

  def __init__(
    self,
    writer: MetricsWriter,
    *,
    goodput: GoodputLog,
    measure: Callable[[float], dict[str, float]],
    ids_path: Path | None,
    max_bad_steps: int,
    max_bad_images: Callable[[int], int],
    describe_bad_example: Callable[[int], str],
    describe_wait: Callable[[float], str],
    step: int,
    counters: dict,
  ):
    """Open the log of a run that continues after `step`, with the counters of its checkpoint.

    `max_bad_images` maps a step to the number of unreadable images that a run may have met by then.
    `describe_bad_example` maps an example to its name and what is wrong with it. `describe_wait`
    maps the share of the time in which the devices waited for data to a line about it.
    """
    # Why the run has to save and end, once it has to; the same on all hosts.
    self.abort_error: UserError | None = None
    self.writer, self.goodput, self.stopwatch = writer, goodput, Stopwatch()
    self._data_wait, self._describe_wait = DataWait(), describe_wait
    self._summaries, self._reported_wait = 0, False
    self._measure, self._max_bad_steps = measure, max_bad_steps
    self._max_bad_images, self._describe_bad_example = max_bad_images, describe_bad_example
    self._ids_path = ids_path if jax.process_index() == 0 else None
    self._needs_ids, self._unwritten_ids = ids_path is not None, ''
    # A run that ended after too many bad steps may take as many again when it is started again.
    self._bad_steps_in_a_row = counters.get('bad_steps_in_a_row', 0) % max_bad_steps
    self._unreadable_images = counters.get('unreadable_images', 0)
    self._pending: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
    self._flushed: list[dict[str, np.ndarray]] = []
    if self._ids_path:
      with explain_write_errors(self._ids_path.parent):
        keep_records(self._ids_path, step)

  @property
  def counters(self) -> dict[str, int]:
    """The counters of the flushed steps, which a checkpoint saves."""
    return {
      'bad_steps_in_a_row': self._bad_steps_in_a_row,
      'unreadable_images': self._unreadable_images,
    }

  def append(self, step: int, metrics: dict[str, jax.Array], ids: np.ndarray):
    """Add a step that the devices may still be computing. This waits for nothing.

    `metrics` is what `train_step` returned. `ids` [b] are this host's examples; ~i is an example i
    that could not be read.
    """
    self._pending.append((step, metrics, ids))
    self._data_wait.step_dispatched(metrics)

  def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches. The summaries then tell how long the devices waited for them."""
    return self._data_wait.time_batches(batches)

  def start_steps(self, step: int):
    """Report that the run is ready for the step after `step`."""
    self.goodput.record(step, self.stopwatch.total())

  def flush(self):
    """Wait for the added steps, and report bad steps and unreadable images.

    All hosts call it after the same step.

    Raises UserError if more images could not be read than `max_bad_fraction` allows.
    """
    if not self._pending:
      return
    steps, metrics, ids = zip(*self._pending, strict=True)
    self._pending, metrics = [], jax.device_get(metrics)
    self._flushed += metrics
    self.goodput.record(steps[-1], self.stopwatch.total())
    reasons = [next((name for name in SKIP_REASON_TEXTS if each[name]), '') for each in metrics]
    skipped = [each['skipped'].item() for each in metrics]
    needs_ids = self._needs_ids or any(reasons) or any(skipped)
    rows = all_gather_rows(ids) if needs_ids else ids
    if self._needs_ids:
      self._write_ids(steps, metrics, rows)
    for step, reason, bad_images, row in zip(steps, reasons, skipped, rows, strict=True):
      self._bad_steps_in_a_row = self._bad_steps_in_a_row + 1 if reason else 0
      if reason:
        self._report_bad_step(step, reason, np.maximum(row, ~row).tolist())
      if bad_images:
        self._report_unreadable(step, (~row[row < 0]).tolist())

  @jax.profiler.annotate_function
  def write_summary(self, step: int):
    """Record, and show, what the steps since the last summary did.

    Means over the good ones, counts of the others.
    """
    self.flush()
    steps, self._flushed = self._flushed, []
    seconds = self.stopwatch.lap()
    measured = self._measure(seconds / len(steps))
    waited = min(1.0, self._data_wait.lap() / seconds)
    good = [each for each in steps if not any(each[name] for name in SKIP_REASON_TEXTS)] or steps
    means = {name: float(np.mean([each[name] for each in good])) for name in ('loss', 'grad_norm')}
    counts = {
      name: sum(each[name].item() for each in steps) for name in ('skipped', *SKIP_REASON_TEXTS)
    }
    values = means | {'lr': steps[-1]['lr'].item()} | counts | measured
    values['data_wait'] = waited
    self.writer.write(step, values, kind='train')
    self.writer.show_progress(step, values)
    self._report_wait(waited)

  def write_goodput(self, step: int, *, complete: bool):
    """Write the last line about goodput; of a complete run also a record, unless it has one."""
    values = self.goodput.record(step, self.stopwatch.total(), complete=complete)
    if complete and values:
      self.writer.write(step, values, kind='goodput')

  def close(self):
    """Close the files.

    Raises `abort_error` if the run had to end early.
    """
    if self.abort_error and self._ids_path:
      with contextlib.suppress(OSError, UserError):
        self._append_ids(self._ids_path)
    self.close_files()
    if self.abort_error:
      raise self.abort_error

  def close_files(self):
    """Close the files of the records and of goodput; a second call does nothing."""
    self.goodput.close()
    self.writer.close()

  def _write_ids(self, steps: Sequence[int], metrics: list[dict], ids):
    """Append lines to ids.jsonl on the first host. If that fails, all hosts save and end the run.

    `log_ids` promises a line for each step, and no step is taken again.
    """
    problem = ''
    if self._ids_path:
      for step, each, row in zip(steps, metrics, ids, strict=True):
        loss, examples = each['loss'].item().hex(), np.maximum(row, ~row).tolist()
        self._unwritten_ids += json.dumps({'step': step, 'loss': loss, 'ids': examples}) + '\n'
      try:
        self._append_ids(self._ids_path)
      except (OSError, StorageError) as error:
        problem = summarize_error(error)
    if problem := broadcast_first(problem):
      self.abort_error = self.abort_error or StorageError(
        f'ids.jsonl lacks the lines of step {steps[0]} and later: {problem}. The state is saved. '
        'Correct the storage, or set config.log_ids=False, and start again'
      )

  def _append_ids(self, path: Path):
    """Append the lines that are not written yet, with retries."""
    retry_io(f'writing {path}', lambda: append_text(path, self._unwritten_ids))
    self._unwritten_ids = ''

  def _report_wait(self, share: float):
    """Print a line, once, if the devices wait for data too long.

    The first summary does not count: the loader has just started.
    """
    self._summaries += 1
    if share > HIGH_SHARE and self._summaries > 1 and not self._reported_wait:
      self._reported_wait = True
      self.writer.print_line(self._describe_wait(share))

  def _report_bad_step(self, step: int, reason: str, ids: list[int]):
    self.writer.write_jsonl(step, {'left_out': reason, 'ids': ids}, kind='bad_step')
    shown = ', '.join(map(str, ids[:MAX_PRINTED_IDS]))
    more = ', … (all in metrics.jsonl)' if len(ids) > MAX_PRINTED_IDS else ''
    why = SKIP_REASON_TEXTS[reason]
    self.writer.print_line(f'step {step} changes nothing: {why}; examples {shown}{more}')
    if self._bad_steps_in_a_row == self._max_bad_steps and not self.abort_error:
      self.abort_error = DivergedError(
        f'steps {step - self._max_bad_steps + 1} to {step} changed nothing, which is '
        f'config.optim.max_bad_steps={self._max_bad_steps} in a row. The last: {why}. The saved '
        'state is that before '
        'them; metrics.jsonl lists their examples'
      )

  def _report_unreadable(self, step: int, ids: list[int]):
    self.writer.write_jsonl(step, {'unreadable': ids}, kind='unreadable')
    if jax.process_index() == 0:
      for i in ids[:MAX_PRINTED_IDS]:
        self.writer.print_line(f'step {step} omits example {i}: {self._describe_bad_example(i)}')
    self._unreadable_images += len(ids)
    if self._unreadable_images > (most := self._max_bad_images(step)):
      raise UserError(
        f'{self._unreadable_images} images could not be read by step {step}, and '
        'config.data.max_bad_fraction allows '
        f'{most}. The last is {self._describe_bad_example(ids[-1])}. Replace or remove such '
        'files, or raise the setting'
      )


def all_gather_rows(rows: tuple[np.ndarray, ...]) -> np.ndarray:
  """Gather int64 [b] of each step from all hosts into [steps, b of all hosts].

  The order is that of the global batch.
  """
  if jax.process_count() == 1:
    return np.stack(rows)
  # JAX would drop the upper half of an int64: gather int32 [hosts, steps, 2 b].
  parts = process_allgather(np.stack(rows).view(np.int32))
  return np.concatenate([np.ascontiguousarray(part).view(np.int64) for part in parts], axis=1)
