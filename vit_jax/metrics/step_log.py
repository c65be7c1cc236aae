"""What each step did, read late, so that the loop waits for no device, and yet of every step.

A step whose loss or gradients are not finite, or are spikes (spikes.py), has left the state as it was. Here it is counted, and
named with its examples in a line of metrics.jsonl, {"step": 7, "left_out": "not_finite", "ids": […]}; so many in a row end the
run. Images that could not be read are named likewise, {"step": 7, "unreadable": […]}, and held to a budget. On request each
step gets a line in ids.jsonl, {"step": 7, "loss": "0x1.26bb1ap+1", "ids": […]}: the loss to the bit, and the examples of the
global batch in its order, as the loader gave them out.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from vit_jax.config import Config
from vit_jax.data.loader import diagnose_bad_example, max_bad_examples
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.metrics.writer import MetricsWriter, read_record_lines

MAX_PRINTED_IDS = 8  # Examples named on the screen at a time; metrics.jsonl has all.
SKIP_REASON_TEXTS = {
  'not_finite': 'its loss or gradients are not finite',
  'spikes': 'its loss or gradient norm is a spike',
}


def open_step_log(
  config: Config, workdir: Path, metrics: MetricsWriter, source: Source, *, step: int
) -> 'StepLog':
  """The account of the steps of a run on `source` after `step`."""
  examples, batch, pixels = len(source), config.data.batch, config.data.max_pixels
  return StepLog(
    workdir,
    metrics,
    step=step,
    log_ids=config.log_ids,
    max_bad_steps=config.optim.max_bad_steps,
    max_bad_images=lambda step: (
      max_bad_examples(config.data, examples) * -(-step * batch // examples)
    ),  # Of each epoch begun.
    why_bad=lambda i: ': '.join(diagnose_bad_example(source, i, pixels)),
  )


class StepLog:
  """The account of one run's steps, which all hosts keep alike."""

  def __init__(
    self,
    workdir: Path,
    metrics: MetricsWriter,
    *,
    step: int,
    log_ids: bool,
    max_bad_steps: int,
    max_bad_images: Callable[[int], int],
    why_bad: Callable[[int], str],
  ):
    """Goes on after `step`, with what was left out until there. `max_bad_images`: those that a run may have met by a step;
    `diagnose_bad_example`: an example -> what it is called, and what is wrong with it."""
    self.hopeless = ''  # Why the run should end, once it should.
    self._metrics, self._max_bad, self._max_bad_images, self._why_bad = (
      metrics,
      max_bad_steps,
      max_bad_images,
      why_bad,
    )
    self._ids_path = workdir / 'ids.jsonl' if log_ids else None
    self._unread, self._values = [], []
    # The first host's account is everybody's: it alone writes the file. A run that gave up there starts to count anew.
    counts = [
      count_left_out_streak(metrics.records, step) % max_bad_steps,
      count_unreadable_images(metrics.records),
    ]
    self._in_a_row, self._bad_images = broadcast_one_to_all(np.array(counts, np.int32)).tolist()
    if self._ids_path and not jax.process_index():
      self._ids_path.write_text(
        ''.join(
          line for line in read_record_lines(self._ids_path) if json.loads(line)['step'] <= step
        )
      )

  def add(self, step: int, values: dict[str, jax.Array], ids: np.ndarray):
    """A step that is on its way: what `train_step` gives, and this host's examples [b], where ~i is an i that can not be read.
    Waits for nothing."""
    self._unread.append((step, values, ids))

  @property
  def steps(self) -> int:
    """Those since the last record."""
    return len(self._unread) + len(self._values)

  def settle(self):
    """Waits for the steps that were added, and says what there is to say of them. All hosts call it after the same step.

    UserError where more images could not be read than may be.
    """
    if not self._unread:
      return
    steps, values, ids = zip(*self._unread, strict=True)
    self._unread, values = [], jax.device_get(values)
    self._values += values
    why = [next((name for name in SKIP_REASON_TEXTS if each[name]), '') for each in values]
    skipped = [each['skipped'].item() for each in values]
    ids = all_gather_rows(ids) if self._ids_path or any(why) or any(skipped) else ids
    if self._ids_path and not jax.process_index():
      lines = zip(steps, values, ids, strict=True)
      lines = [
        {'step': step, 'loss': each['loss'].item().hex(), 'ids': np.maximum(row, ~row).tolist()}
        for step, each, row in lines
      ]
      with self._ids_path.open('a') as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)
    for step, reason, bad_images, row in zip(steps, why, skipped, ids, strict=True):
      self._in_a_row = self._in_a_row + 1 if reason else 0
      if reason:
        self._left_out(step, reason, np.maximum(row, ~row).tolist())
      if bad_images:
        self._unreadable(step, (~row[row < 0]).tolist())

  def _left_out(self, step: int, reason: str, ids: list[int]):
    self._metrics.note(step, {'left_out': reason, 'ids': ids})
    shown = ', '.join(map(str, ids[:MAX_PRINTED_IDS])) + (
      ', … (all in metrics.jsonl)' if len(ids) > MAX_PRINTED_IDS else ''
    )
    self._metrics.say(f'step {step} changes nothing: {SKIP_REASON_TEXTS[reason]}; examples {shown}')
    if self._in_a_row == self._max_bad and not self.hopeless:
      self.hopeless = (
        f'steps {step - self._max_bad + 1} to {step} were left out, config.optim.max_bad_steps={self._max_bad} in a row: '
        f'of the last, {SKIP_REASON_TEXTS[reason]}. What is saved is as it was before them; metrics.jsonl names their examples'
      )

  def _unreadable(self, step: int, ids: list[int]):
    self._metrics.note(step, {'unreadable': ids})
    if not jax.process_index():
      for i in ids[:MAX_PRINTED_IDS]:
        self._metrics.say(f'step {step} goes without example {i}: {self._why_bad(i)}')
    self._bad_images += len(ids)
    if self._bad_images > (most := self._max_bad_images(step)):
      raise UserError(
        f'by step {step} {self._bad_images} images could not be read, and config.data.max_bad_fraction allows {most}; the last is '
        f'{self._why_bad(ids[-1])}. Replace or remove such files, or allow more'
      )

  def record(self) -> dict[str, float]:
    """What the settled steps since the last record say together: means over those that counted, and how many did not."""
    values, self._values = self._values, []
    counted = [
      each for each in values if not any(each[name] for name in SKIP_REASON_TEXTS)
    ] or values
    out = {name: float(np.mean([each[name] for each in counted])) for name in ('loss', 'grad_norm')}
    out |= {'lr': values[-1]['lr'].item()}
    return out | {
      name: sum(each[name].item() for each in values) for name in ('skipped', *SKIP_REASON_TEXTS)
    }


def count_left_out_streak(records: list[dict], step: int) -> int:
  """Steps in a row, with `step` the last, that were left out."""
  left_out = {record['step'] for record in records if 'left_out' in record}
  return next(count for count in range(step + 1) if step - count not in left_out)


def count_unreadable_images(records: list[dict]) -> int:
  """Images that could not be read, over all steps."""
  return sum(len(record.get('unreadable', ())) for record in records)


def all_gather_rows(rows: tuple[np.ndarray, ...]) -> np.ndarray:
  """This host's int64 [b] of each step -> [steps, b of all hosts], in the order of the global batch."""
  if jax.process_count() == 1:
    return np.stack(rows)
  parts = process_allgather(
    np.stack(rows).view(np.int32)
  )  # Halves, since JAX would drop the upper ones. [hosts, steps, 2 b].
  return np.concatenate([np.ascontiguousarray(part).view(np.int64) for part in parts], axis=1)
