"""Every record is written once, also after an interruption."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from vit_jax.errors import UserError
from vit_jax.metrics.curves import plot_curves
from vit_jax.metrics.records import read_metrics
from vit_jax.metrics.writer import MetricsWriter, Stopwatch

TRAIN = {
  'loss': 1.0, 'lr': 0.1, 'images_per_second': 1234.5, 'seconds_per_step': 0.5, 'data_wait': 0.03,
}  # fmt: skip


def test_resuming_removes_the_records_of_steps_that_are_taken_again(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  for step in (2, 4, 6):
    metrics.write(step, TRAIN, kind='train')
  metrics.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 7, "lo')  # Cut short by a crash.
  again = MetricsWriter(tmp_path, step=4, steps=9)
  again.write(6, TRAIN, kind='train')
  again.close()
  assert [record['step'] for record in read_metrics(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize(
  'line',
  ['{"step": 2, "loss"', '[]', '{}', '3', '{"step": "2"}', '{"step": 1.5}', '\0\0', '\ufffd'],
)
def test_resuming_removes_and_counts_lines_that_are_not_records(tmp_path, line, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    f'{{"step": 1, "kind": "train"}}\n{line}\n{{"step": 3, "kind": "train"}}\n', encoding='utf-8'
  )
  with pytest.raises(UserError, match=r'metrics.jsonl, line 2'):
    read_metrics(tmp_path)
  MetricsWriter(tmp_path, step=3, steps=9).close()
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 3]
  assert 'line 2' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('record', 'kind'),
  [
    ({'loss': 1.0, 'lr': 0.1}, 'train'),
    ({'test_accuracy': 0.5, 'test_loss': 1.0}, 'eval'),
    ({'fewshot/digits_5shot': 0.5}, 'probe'),
    ({'left_out': 'spikes', 'ids': [1]}, 'bad_step'),
    ({'unreadable': [7]}, 'unreadable'),
  ],
)
def test_records_written_before_they_had_a_kind_get_one(tmp_path, record, kind):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps({'step': 2} | record) + '\n', encoding='utf-8')
  assert read_metrics(tmp_path) == [{'step': 2, 'kind': kind} | record]
  assert read_metrics(tmp_path, kind) and not read_metrics(tmp_path, 'other')


def test_tensorboard_gets_every_value(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.write(3, TRAIN, kind='train')
  metrics.close()
  (file,) = (tmp_path / 'tensorboard').iterdir()
  values = {
    value.tag: value.simple_value
    for event in events(file)
    for value in event.summary.value
    if event.step == 3
  }
  assert values == pytest.approx(TRAIN)


def events(file):
  """Return TensorBoard's records: a length, its checksum, an Event, its checksum."""
  data = file.read_bytes()
  while data:
    length = int.from_bytes(data[:8], 'little')
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]


def test_progress_without_a_terminal_is_a_complete_line(tmp_path, capsys):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.show_progress(5, TRAIN | {'mfu': 0.42})
  metrics.close()
  assert (
    capsys.readouterr().err
    == 'step 5/9  loss 1.0000  lr 1.00e-01  img/s 1,234  data wait 3%  mfu 42.0%  left 00:02\n'
  )


def test_a_loss_that_is_nan_is_written_as_valid_json(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.write(1, TRAIN | {'loss': float('nan')}, kind='train')
  metrics.close()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text(encoding='utf-8'))['loss'] == 'nan'


def test_other_hosts_write_nothing(tmp_path, capsys):
  metrics = MetricsWriter(tmp_path, step=0, steps=9, write=False)
  metrics.write(1, TRAIN, kind='train')
  metrics.print_line('nothing')
  metrics.close()
  assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ''


def test_pauses_are_not_counted():
  work = jax.block_until_ready(jnp.zeros(3))
  watch = Stopwatch()
  with watch.paused(work):
    time.sleep(0.5)
  assert watch.lap() < 0.5


def test_curves_are_a_picture(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.write(1, TRAIN, kind='train')
  metrics.write(1, {'test_accuracy': 0.5, 'test_loss': 1.1}, kind='eval')
  metrics.close()
  assert plot_curves(tmp_path).read_bytes().startswith(b'\x89PNG')
