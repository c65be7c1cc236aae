"""The log of steps is exact however late it is read, and after an interruption."""

import json
import re

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.metrics.goodput import GoodputLog
from vit_jax.metrics.records import read_metrics
from vit_jax.metrics.step_log import StepLog
from vit_jax.metrics.writer import MetricsWriter


def open_log(
  workdir, *, step: int = 0, log_ids: bool = True, counters: dict | None = None
) -> StepLog:
  return StepLog(
    MetricsWriter(workdir, step=step, steps=99),
    goodput=GoodputLog(workdir, step=step, steps=99, began=0.0, report=print),
    measure=lambda seconds: {'images_per_second': 1.0, 'seconds_per_step': seconds},
    ids_path=workdir / 'ids.jsonl' if log_ids else None,
    max_bad_steps=3,
    max_bad_images=lambda step: 2 * -(-step // 10),  # Two in each ten steps.
    describe_bad_example=lambda i: f'{i}.jpg: cut short',
    describe_wait=lambda share: f'waited {share:.0%}',
    step=step,
    counters=counters or {},
  )


def add(
  log: StepLog,
  step: int,
  *,
  loss=None,
  not_finite: bool = False,
  spikes: bool = False,
  unreadable: tuple = (),
):
  loss = step / 3 if loss is None else loss
  ids = np.arange(12) + 100 * step
  ids[list(unreadable)] = ~ids[list(unreadable)]
  values = {'loss': np.float32(loss), 'grad_norm': np.float32(2 * loss), 'lr': np.float32(step)}
  values |= {
    'not_finite': np.bool_(not_finite),
    'spikes': np.bool_(spikes),
    'skipped': np.int32(len(unreadable)),
  }
  log.append(step, values, ids)


def lines(workdir) -> list[dict]:
  return [
    json.loads(line) for line in (workdir / 'ids.jsonl').read_text(encoding='utf-8').splitlines()
  ]


def test_each_step_is_a_line_with_its_examples_and_its_loss_to_the_bit(tmp_path):
  log = open_log(tmp_path)
  for step in (1, 2, 3):
    add(log, step)
  log.flush()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]
  assert [float.fromhex(line['loss']) for line in lines(tmp_path)] == [
    float(np.float32(step / 3)) for step in (1, 2, 3)
  ]
  assert lines(tmp_path)[1]['ids'] == list(range(200, 212))


def test_resuming_removes_the_lines_of_steps_that_are_taken_again(tmp_path):
  log = open_log(tmp_path)
  for step in range(1, 7):
    add(log, step)
  log.flush()
  with (tmp_path / 'ids.jsonl').open('a') as file:
    file.write('{"step": 7, "ids": [1')  # Cut short by a crash.
  again = open_log(tmp_path, step=4)
  add(again, 5)
  again.flush()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_bad_step_is_recorded_with_its_examples_and_left_out_of_the_means(tmp_path, capsys):
  log = open_log(tmp_path)
  add(log, 1, loss=1.0)
  add(log, 2, loss=np.nan, not_finite=True)
  add(log, 3, loss=100.0, spikes=True)
  add(log, 4, loss=2.0, unreadable=(3, 5))
  log.write_summary(4)
  log.writer.close()
  (summary,) = read_metrics(tmp_path, 'train')
  assert summary.pop('seconds_per_step') > 0
  expected = {'loss': 1.5, 'grad_norm': 3.0, 'lr': 4.0, 'skipped': 2, 'not_finite': 1, 'spikes': 1}
  expected |= {'data_wait': 0.0}
  assert summary == {'step': 4, 'kind': 'train', 'images_per_second': 1.0} | expected
  bad_steps = read_metrics(tmp_path, 'bad_step')
  notes = [(record['step'], record['left_out'], record['ids']) for record in bad_steps]
  assert notes == [(2, 'not_finite', list(range(200, 212))), (3, 'spikes', list(range(300, 312)))]
  said = capsys.readouterr().err
  assert re.search('step 2 .*not finite.* 200, 201,', said)
  assert re.search('step 3 .*spike.* 300, 301,', said)


@pytest.mark.parametrize('every', [1, 2, 7, 20])
def test_the_count_of_bad_steps_in_a_row_does_not_depend_on_when_the_log_is_read(tmp_path, every):
  log, bad = open_log(tmp_path), {3, 4, 6, 7, 9, 10, 11, 13}
  for step in range(1, 21):
    add(log, step, not_finite=step in bad, spikes=False)
    if step % every == 0:
      log.flush()
      assert bool(log.abort_error) == (step >= 11)
  log.flush()
  assert re.search('steps 9 to 11 .*config.optim.max_bad_steps=3', str(log.abort_error))


@pytest.mark.parametrize(('stop', 'ends'), [(9, 11), (10, 11), (11, 14), (8, None)])
def test_bad_steps_count_across_an_interruption_and_from_0_after_an_abort(tmp_path, stop, ends):
  first = open_log(tmp_path)
  for step in range(1, stop + 1):
    add(first, step, not_finite=step >= 9)
  first.flush()
  again = open_log(tmp_path, step=stop, counters=first.counters)
  for step in range(stop + 1, 16):
    add(again, step, not_finite=ends is not None)
    again.flush()
    if again.abort_error:
      break
  assert (step if again.abort_error else None) == ends


def test_unreadable_images_are_recorded_and_counted_across_an_interruption(tmp_path, capsys):
  log = open_log(tmp_path)
  add(log, 1)
  add(log, 2, unreadable=(0, 11))
  log.flush()
  log.writer.close()
  assert read_metrics(tmp_path) == [{'step': 2, 'kind': 'unreadable', 'unreadable': [200, 211]}]
  assert lines(tmp_path)[1]['ids'] == list(range(200, 212))
  assert re.search('step 2 .*example 211: 211.jpg', capsys.readouterr().err)
  again = open_log(tmp_path, step=2, counters=log.counters)
  add(again, 9, unreadable=(4,))
  with pytest.raises(
    UserError,
    match='3 images .* step 9, .*config.data.max_bad_fraction allows 2. .*904.jpg',
  ):
    again.flush()
  once_more = open_log(tmp_path, step=1)  # From before any of them.
  add(once_more, 2, unreadable=(0, 11))
  add(once_more, 11, unreadable=(7, 8))  # The next ten steps have begun.
  once_more.flush()


def test_without_log_ids_no_file_of_ids_is_written(tmp_path):
  log = open_log(tmp_path, log_ids=False)
  add(log, 1)
  log.flush()
  log.writer.close()
  assert not (tmp_path / 'ids.jsonl').exists() and not read_metrics(tmp_path)
