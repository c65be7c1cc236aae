"""The account of steps: exact however late it is read, and the same after an interruption."""

import json

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.metrics.step_log import StepLog
from vit_jax.metrics.writer import MetricsWriter, read_metrics


def open_ledger(workdir, *, step: int = 0, log_ids: bool = True) -> StepLog:
  return StepLog(
    workdir,
    MetricsWriter(workdir, step=step, steps=99),
    step=step,
    log_ids=log_ids,
    max_bad_steps=3,
    max_bad_images=lambda step: 2 * -(-step // 10),  # Two in each ten steps.
    why_bad=lambda i: f'{i}.jpg: cut short',
  )


def add(
  ledger: StepLog,
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
  ledger.add(step, values, ids)


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'ids.jsonl').read_text().splitlines()]


def test_each_step_is_a_line_with_its_examples_and_its_loss_to_the_bit(tmp_path):
  ledger = open_ledger(tmp_path)
  for step in (1, 2, 3):
    add(ledger, step)
  ledger.settle()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]
  assert [float.fromhex(line['loss']) for line in lines(tmp_path)] == [
    float(np.float32(step / 3)) for step in (1, 2, 3)
  ]
  assert lines(tmp_path)[1]['ids'] == list(range(200, 212))


def test_going_on_takes_out_the_lines_of_steps_that_are_made_again(tmp_path):
  ledger = open_ledger(tmp_path)
  for step in range(1, 7):
    add(ledger, step)
  ledger.settle()
  with (tmp_path / 'ids.jsonl').open('a') as file:
    file.write('{"step": 7, "ids": [1')  # Cut short by a crash.
  again = open_ledger(tmp_path, step=4)
  add(again, 5)
  again.settle()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_step_that_was_left_out_is_named_with_its_examples_and_counts_in_no_mean(
  tmp_path, capsys
):
  ledger = open_ledger(tmp_path)
  add(ledger, 1, loss=1.0)
  add(ledger, 2, loss=np.nan, not_finite=True)
  add(ledger, 3, loss=100.0, spikes=True)
  add(ledger, 4, loss=2.0, unreadable=(3, 5))
  assert ledger.steps == 4
  ledger.settle()
  assert ledger.record() == {
    'loss': 1.5,
    'grad_norm': 3.0,
    'lr': 4.0,
    'skipped': 2,
    'not_finite': 1,
    'spikes': 1,
  }
  assert ledger.steps == 0
  notes = [
    (record['step'], record['left_out'], record['ids']) for record in read_metrics(tmp_path)[:2]
  ]
  assert notes == [(2, 'not_finite', list(range(200, 212))), (3, 'spikes', list(range(300, 312)))]
  said = capsys.readouterr().err
  assert 'step 2 changes nothing: its loss or gradients are not finite; examples 200, 201,' in said
  assert 'step 3 changes nothing: its loss or gradient norm is a spike; examples 300, 301,' in said


@pytest.mark.parametrize('every', [1, 2, 7, 20])
def test_so_many_in_a_row_are_counted_however_late_they_are_read(tmp_path, every):
  ledger, bad = open_ledger(tmp_path), {3, 4, 6, 7, 9, 10, 11, 13}
  for step in range(1, 21):
    add(ledger, step, not_finite=step in bad, spikes=False)
    if step % every == 0:
      ledger.settle()
      assert bool(ledger.hopeless) == (step >= 11)
  ledger.settle()
  assert 'steps 9 to 11 were left out, config.optim.max_bad_steps=3 in a row' in ledger.hopeless


@pytest.mark.parametrize(('stop', 'ends'), [(9, 11), (10, 11), (11, 14), (8, None)])
def test_a_row_that_an_interruption_divides_is_one_and_a_run_that_gave_up_begins_anew(
  tmp_path, stop, ends
):
  first = open_ledger(tmp_path)
  for step in range(1, stop + 1):
    add(first, step, not_finite=step >= 9)
  first.settle()
  again = open_ledger(tmp_path, step=stop)
  for step in range(stop + 1, 16):
    add(again, step, not_finite=ends is not None)
    again.settle()
    if again.hopeless:
      break
  assert (step if again.hopeless else None) == ends


def test_images_that_can_not_be_read_are_named_and_counted_over_an_interruption(tmp_path, capsys):
  ledger = open_ledger(tmp_path)
  add(ledger, 1)
  add(ledger, 2, unreadable=(0, 11))
  ledger.settle()
  assert read_metrics(tmp_path) == [{'step': 2, 'unreadable': [200, 211]}]
  assert lines(tmp_path)[1]['ids'] == list(range(200, 212))
  assert 'step 2 goes without example 211: 211.jpg: cut short' in capsys.readouterr().err
  again = open_ledger(tmp_path, step=2)
  add(again, 9, unreadable=(4,))
  with pytest.raises(
    UserError,
    match='by step 9 3 images could not be read, and config.data.max_bad_fraction allows 2; the last is 904',
  ):
    again.settle()
  once_more = open_ledger(tmp_path, step=1)  # From before any of them.
  add(once_more, 2, unreadable=(0, 11))
  add(once_more, 11, unreadable=(7, 8))  # The next ten steps have begun.
  once_more.settle()


def test_nothing_is_written_without_being_asked_for(tmp_path):
  ledger = open_ledger(tmp_path, log_ids=False)
  add(ledger, 1)
  ledger.settle()
  assert not (tmp_path / 'ids.jsonl').exists() and not read_metrics(tmp_path)
